"""Tables of which a batch reads some rows: layers, row-sparse gradients, and the update of the rows that these name.

``layers`` and ``bag`` are what stands in a model; ``embedding`` is ``value_and_grad``, which records in ``look_ups``
what a layer reads of its table; ``gradient`` is the ``RowSparse`` that comes of it, ``ops`` and ``kernels`` (Metal) its
update; ``pooling`` reads rows in blocks, ``norms`` limits their norms, ``trainers`` patches ``mlx.nn``.

A new layer derives from ``SparseEmbedding`` and reads rows by ``_look_up``, or by ``table_of(self).read(reading, ...)``
with a ``Reading`` of its own (``pooling.BagSums`` is one) where it needs no row for every index. A new gradient format
or update goes beside ``ops``. Here may live what knows of rows; what does not belongs to ``update``, which ``sparse``
imports and not the other way round.
"""
