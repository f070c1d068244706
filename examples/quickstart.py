"""Fit a sine: the twelve lines of the README."""

import mlx.core as mx
import mlx.nn as nn

from mlx_adagrad import Adagrad

x = mx.random.uniform(-3, 3, (1024, 1))
model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = Adagrad(learning_rate=0.1)
step = nn.value_and_grad(model, lambda: nn.losses.mse_loss(model(x), mx.sin(x)))

for _ in range(300):
    loss, grads = step()
    optimizer.update(model, grads)
    mx.eval(model.parameters(), optimizer.state)
print(f"loss {loss.item():.5f}")
