"""The machine's own rates, and one implementation in a process of its own."""

import multiprocessing
import resource
import time


def gemm_rate() -> float:
    """fp32 FLOP/s of XLA's matrix product at PairRM's shapes, the best of ten."""
    import jax
    import jax.numpy as jnp

    x, w = jnp.ones((2048, 1024)), jnp.ones((1024, 4096))
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    product(x, w).block_until_ready()
    best = min(timed(lambda: product(x, w).block_until_ready())[0] for _ in range(10))
    return 2 * x.shape[0] * w.size / best


def timed(function):
    """(seconds, what function() gives)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def read_rate() -> float:
    """Bytes per second at which a large array is read, the best of ten."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((128, 1 << 20))
    total = jax.jit(lambda x: jnp.sum(x, axis=1))
    total(x).block_until_ready()
    return x.nbytes / min(timed(lambda: total(x).block_until_ready())[0] for _ in range(10))


def peak_memory() -> int:
    """Bytes: the most that this process ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Side:
    """One implementation in a process of its own, asked in turns: worker(pipe, *args) answers each
    (what, given) that comes through its pipe."""

    def __init__(self, worker, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=worker, args=(other, *args), daemon=True)
        self._process.start()

    def ask(self, what: str, given=None):
        self._pipe.send((what, given))
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process ended; what it printed is above") from None

    def close(self):
        self._process.terminate()
