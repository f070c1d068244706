"""The update of one tensor: the formula, how ``v`` and weights are stored, and the code that runs on CPUs and GPUs.

``rule`` is the formula, in operations on arrays of the compute dtype; ``metal/rule.metal`` says the same for one
element. ``ops`` compiles it for any device, ``kernels`` launches it on a GPU, ``batches`` puts many tensors into one
compiled call; ``step`` makes the numbers of a step once for all tensors, ``modifiers`` brings those of wrappers;
``accumulators``, ``storage``, ``narrow`` and ``rounding`` say how things are kept; ``streams`` acts on CPUs only, and
``devices`` tells where a step runs.

Here may live what knows of one tensor, or of several with one rule, and of no table, tree or optimizer: ``sparse``
and ``dispatch`` import ``update``, not the other way round.

To add a kernel: a body in ``metal/`` that loads, calls the helpers of ``rule.metal``, and stores; a launch that gets
it from ``kernels.kernel`` with ``Scalars.inputs()`` among its inputs (numbers cost no launch there); one line in
``supports``. Take strides (``strided=True`` and ``layout.metal``) where a gradient is read, or MLX copies it first.
The tests run it on the host by themselves: hold it against ``ops`` and float64, and count its bytes. To add an
accumulator: a subclass of ``Dense`` that says how ``v`` starts, is read and is written. It runs by operations at
once, and on a GPU when there is a kernel for it.
"""
