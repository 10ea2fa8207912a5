"""Train and sample a tiny model on meshes of eight simulated devices and check where everything
lies. tests/sharding/test_sharding.py runs it, in a process with so many, with the meshes as
arguments (`1,8,1 2,2,2`); it prints what lies wrong.

What each array should be cut along is said here once more, by hand: not by sharding/mesh.py.
"""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model import decoder, generate, losses, train
from model.packing import Sequence, pack
from model.precision import FLOAT32
from sharding.mesh import batch_shards, make_mesh, put_batch, replicated
from tests import tiny

BATCH = ("data", "fsdp")
PARAMETERS = {
    "embed": ("tensor", "fsdp"),
    "unembed": ("fsdp", "tensor"),
    "final_norm": (None,),
    "layers": {
        "q": (None, "fsdp", "tensor", None),
        "k": (None, "fsdp", "tensor", None),
        "v": (None, "fsdp", "tensor", None),
        "o": (None, "tensor", None, "fsdp"),
        "gate": (None, "fsdp", "tensor"),
        "up": (None, "fsdp", "tensor"),
        "down": (None, "tensor", "fsdp"),
        "attn_norm": (None, None),
        "mlp_norm": (None, None),
    },
}
CONFIG = tiny.config(
    num_attention_heads=8, num_key_value_heads=8, head_dim=4, tie_word_embeddings=False
)


def wrong(name: str, x: jax.Array, axes: tuple, mesh) -> list[str]:
    """What is wrong with where x lies; its dimensions should be cut along `axes`."""
    should = NamedSharding(mesh, PartitionSpec(*axes))
    cuts = [axis for part in axes if part for axis in (part if type(part) is tuple else (part,))]
    share = x.nbytes // int(np.prod([mesh.shape[axis] for axis in cuts]))
    held = {shard.data.nbytes for shard in x.addressable_shards}
    devices = {shard.device for shard in x.addressable_shards}
    if x.sharding.is_equivalent_to(should, x.ndim) and held == {share} and len(devices) == 8:
        return []
    found = getattr(x.sharding, "spec", x.sharding)
    sizes = tuple(mesh.shape.values())
    return [f"{sizes}: {name}: {found}, {held} bytes a device; should be {axes}, {share}"]


class Check:
    def __init__(self, mesh):
        self.mesh, self.wrong, self.count = mesh, [], 0

    def array(self, name, x, axes) -> None:
        self.wrong += wrong(name, x, axes, self.mesh)
        self.count += 1

    def parameters(self, name, params) -> None:
        """Parameters, or what has their form: gradients, moments."""
        assert jax.tree.structure(params) == jax.tree.structure(decoder.abstract(CONFIG))
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            axes = PARAMETERS
            for key in path:
                axes = axes[key.key]
            self.array(f"{name}{jax.tree_util.keystr(path)}", x, axes)

    def layers(self, name, params) -> None:
        """Parameters whose layers are apart."""
        for i, layer in enumerate(params["layers"]):
            for key, x in layer.items():
                self.array(f"{name}, layer {i}, {key}", x, PARAMETERS["layers"][key][1:])
        for key in ("embed", "unembed", "final_norm"):
            self.array(f"{name} {key}", params[key], PARAMETERS[key])

    def cache(self, name, cache) -> None:
        for i, (k, v) in enumerate(cache):
            self.array(f"{name}, keys of layer {i}", k, (BATCH, "tensor", None, None))
            self.array(f"{name}, values of layer {i}", v, (BATCH, "tensor", None, None))

    def optimizer(self, name, state, moments) -> None:
        """`moments`: how many of each parameter there should be; all else is a counter."""
        parts = filter(_has_moments, jax.tree.leaves(state, is_leaf=_has_moments))
        found = [getattr(x, name) for x in parts for name in ("mu", "nu") if hasattr(x, name)]
        assert len(found) == moments
        for i, moment in enumerate(found):
            self.parameters(f"{name}, moment {i} ", moment)
        rest = [x for x in jax.tree.leaves(state) if x.ndim > 0]
        assert len(rest) == len(jax.tree.leaves(found))


def _has_moments(x) -> bool:
    return hasattr(x, "nu")


def check_training(check: Check) -> None:
    mesh = check.mesh
    shapes = decoder.abstract(CONFIG, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    sequences = [Sequence([3] * 5, [[4] * n, [5] * 4]) for n in range(1, 9)]
    batch = put_batch(mesh, pack(sequences, batch_shards(mesh)))
    for name, x in batch.items():
        check.array(f"batch, {name}", x, (BATCH, *(None,) * (x.ndim - 1)))
    names = (
        "ref_chosen",
        "ref_rejected",
        "chosen_tokens",
        "rejected_tokens",
        "win_probability",
        "weights",
    )
    sides = {name: np.ones(8, np.float32) for name in names}
    gradients = None
    for optimizer, moments in (("adamw", 2), ("rmsprop", 1)):
        optimization = train.Optimization(1e-3, "constant", 0.0, optimizer, 0.0, 1.0)
        loss = partial(losses.pair_loss, loss=losses.Loss(), config=CONFIG, precision=FLOAT32)
        trainer = train.Trainer(loss, optimization, 2, shapes)
        params = jax.device_put(tiny.params(CONFIG), shardings)
        check.parameters("parameters", params)
        if gradients is None:  # not donated to `apply`, so they serve both
            gradients, _ = trainer.accumulate(params, None, batch | sides, 16.0)
            check.parameters("gradients", gradients)
            gradients, _ = trainer.accumulate(params, gradients, batch | sides, 16.0)
            check.parameters("gradients, summed", gradients)
        state = trainer.init_optimizer(params)
        check.optimizer(optimizer, state, moments)
        params, state, changed = trainer.apply(params, state, gradients, trainer.norm(gradients))
        assert float(changed) > 0
        check.parameters(f"parameters after a step of {optimizer}", params)
        check.optimizer(f"{optimizer} after a step", state, moments)


def check_sampling(check: Check) -> None:
    sampling = generate.Sampling(n=4, max_new_tokens=4, temperature=1.0)
    params = decoder.abstract(CONFIG, check.mesh)
    params = jax.device_put(tiny.params(CONFIG), jax.tree.map(lambda x: x.sharding, params))
    sampler = generate.Sampler(CONFIG, params, str, sampling, slots=8, longest_prompt=4)
    check.layers("sampler", sampler.params)
    prompts = [(str(i), [3, 4, 5]) for i in range(4)]
    found = sampler.run(prompts, lambda: check.cache("before decoding", sampler.state["cache"]))
    for _ in found:
        check.cache("after decoding", sampler.state["cache"])
    check.layers("sampler at its end", sampler.params)


def main(meshes: list[str]) -> int:
    checked, failed = 0, []
    for sizes in meshes:
        mesh = make_mesh(*map(int, sizes.split(",")))
        # An array that every device holds whole must not pass for one that is cut.
        whole = jax.device_put(np.zeros((8, 8, 8), np.float32), replicated(mesh))
        assert wrong("whole", whole, ("data", "fsdp", "tensor"), mesh)
        check = Check(mesh)
        with jax.set_mesh(mesh):
            check_training(check)
            check_sampling(check)
        checked, failed = checked + check.count, failed + check.wrong
    print("\n".join(failed))
    print(f"{checked} arrays checked, {len(failed)} wrong")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
