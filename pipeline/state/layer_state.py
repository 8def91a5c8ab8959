"""The state of a layer, the unit in which state is kept, sent, saved and restored.

    weights, the optimizer's moments and step counts, the scale of the learning rate; the committed step that all of
    this is of (`version`), and the generation of the run.

A weight that several layers share is a state of its own. Gradients lie beside it, in one flat vector, which may be a
part of a larger one: what is summed over replicas at once lies together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from pipeline.model.layered import LayeredModel
from pipeline.state.checksum import checksum
from pipeline.state.make_optimizer import make_optimizers
from pipeline.state.masks import Masks, mask_gradients, put_back
from pipeline.state.optimizer import OptimizerConfig

UNFILLED = -1
"""The version of a state into which no weights were put yet."""


class StateChanged(RuntimeError):
    """A state is not what the last step has left: memory that fails, or a write that went astray. Names it."""


class LayerState:
    """One state. `parameters` are those that are trained, by full name; `frozen` the other weights.

    Each parameter's `.grad` is a view of `gradient`, so autograd adds into it in place. `lr_scale`, a scalar tensor on
    the host, multiplies the learning rate: CheckFree raises that of a rebuilt stage. Between steps the gradient is
    zero.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *,
        frozen: Mapping[str, Tensor] | None = None, gradient: Tensor | None = None,
        moments: Mapping[str, Mapping[str, Tensor]] | None = None, masks: Masks | None = None, block: bool = False,
    ) -> None:  # fmt: skip
        """`gradient` [all elements, in order] and `moments` (name -> kind) are used where they lie, if they are given,
        and are made otherwise; all of them begin as zeros. With `masks`, nothing else is updated: not by a gradient,
        and not by weight decay. `block`: the weights are those of a decoder block, which Muon takes."""
        self.name, self.parameters, self.frozen, self.config = name, dict(parameters), dict(frozen or {}), config
        self.block = block
        device = next(iter((*self.parameters.values(), *self.frozen.values()))).device
        self.masks = None if masks is None else {name: mask.to(device) for name, mask in masks.items()}
        self.lr_scale = torch.ones(())  # on the host, which alone reads it
        self.version = 0
        self.generation = 0
        self.pull: Callable[[Mapping[str, nn.Parameter]], None] | None = None
        """Adds to the gradient, once it is scaled, what no loss of a microbatch gives."""
        self._seal: Tensor | None = None
        self._printed: tuple[tuple[int, int], Tensor, dict[str, int]] | None = None
        """Of which version and generation the last fingerprints were, and of what sums."""
        self.bind(torch.zeros(self.size, dtype=torch.float32, device=device) if gradient is None else gradient)
        self._optimizers: list[torch.optim.Optimizer] = []
        if self.parameters:
            self._begin(moments)

    def _begin(self, moments: Mapping[str, Mapping[str, Tensor]] | None) -> None:
        """Have optimizers and moments."""
        self._optimizers = make_optimizers(self.parameters, self.config, self.block, moments)

    @property
    def size(self) -> int:
        """Elements of the gradient."""
        return sum(p.numel() for p in self.parameters.values())

    def bind(self, gradient: Tensor) -> None:
        """Have the gradient in this flat tensor from now on; what was in the old one is forgotten."""
        self.gradient, at = gradient, 0
        for parameter in self.parameters.values():
            parameter.grad = gradient[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()

    # ---- a step ----

    def norm(self) -> Tensor:
        """That of the gradient, where anything is updated: a scalar where the gradient is."""
        self._mask()
        return torch.linalg.vector_norm(self.gradient)

    def apply(self, scale: float, lr: float) -> None:
        """One step at `lr` with gradients times `scale`, which then are zero again: the next version. Raises
        StateChanged for a sealed state that is not what it was."""
        self.require_intact()
        self.unseal()
        if self._optimizers:
            self._mask()
            if scale != 1.0:
                self.gradient.mul_(scale)
            if self.pull is not None:
                self.pull(self.parameters)
            before = self._before()
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * float(self.lr_scale)
                optimizer.step()
            self._put_back(before)
            self.gradient.zero_()
        self.version += 1

    def _mask(self) -> None:
        if self.masks is not None:
            mask_gradients(self.parameters, self.masks)

    def _before(self) -> dict[str, Tensor]:
        """The weights, for `_put_back`."""
        return {} if self.masks is None else {name: p.detach().clone() for name, p in self.parameters.items()}

    def _put_back(self, before: Mapping[str, Tensor]) -> None:
        if self.masks is not None:
            put_back(self.parameters, self.masks, before)

    def drop(self) -> None:
        """Forget the gradients of a step that does not count."""
        self.gradient.zero_()

    @torch.no_grad()
    def begin_anew(self) -> None:
        """No gradient, no moments, no steps, and the learning rate as it is scheduled."""
        self.drop()
        self.unseal()
        self._printed = None
        self.lr_scale.fill_(1.0)
        if self.parameters:
            self._forget(self.parameters)

    def _forget(self, names: Iterable[str]) -> None:
        """No moments of these parameters."""
        for name in names:
            for tensor in self.moments(name).values():
                tensor.zero_()

    # ---- what it consists of ----

    def moments(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps of the parameter called `name`, by kind: the tensors themselves. AdamW has `step`,
        `exp_avg` and `exp_avg_sq`, momentum `momentum_buffer`; plain SGD has nothing."""
        parameter = self.parameters[name]
        kept = next((each.state[parameter] for each in self._optimizers if parameter in each.state), {})
        return {kind: kept[kind] for kind in self._kinds(name) if kind in kept}

    def _kinds(self, name: str) -> tuple[str, ...]:
        return self.config.kinds(self.parameters[name].dim(), self.block)

    def weights(self) -> dict[str, Tensor]:
        """Full name -> weight, trained or not."""
        return {name: tensor.detach() for name, tensor in self.all_weights().items()}

    def all_weights(self) -> dict[str, Tensor]:
        """The same themselves: of what is trained the parameters."""
        return {**self.parameters, **self.frozen}

    def tensors(self) -> dict[str, Tensor]:
        """All of it, not copied: `param/NAME`; of what is trained its moments, such as `exp_avg/NAME`, and
        `lr_scale/NAME` once, of the first."""
        found = {f"param/{name}": tensor for name, tensor in self.weights().items()}
        for place, name in enumerate(self.parameters):
            found.update({f"{kind}/{name}": tensor for kind, tensor in self.moments(name).items()})
            if place == 0:
                found[f"lr_scale/{name}"] = self.lr_scale
        return found

    def keys(self) -> list[str]:
        """Those of `tensors`, in its order."""
        found = [f"param/{name}" for name in (*self.parameters, *self.frozen)]
        for place, name in enumerate(self.parameters):
            found += [f"{kind}/{name}" for kind in self._kinds(name)]
            found += [f"lr_scale/{name}"] if place == 0 else []
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state given by `tensors` in. A parameter that has none of its moments there, which another optimizer
        has trained, begins with new ones. Raises KeyError for a missing tensor, RuntimeError for a shape."""
        wanted = self.keys()
        for name in self.parameters:
            mine = {f"{kind}/{name}" for kind in self._kinds(name)}
            if mine and mine.isdisjoint(tensors):
                wanted = [key for key in wanted if key not in mine]
                self._forget((name,))
        given = {key: tensors[key] for key in wanted if key in tensors or not key.startswith("lr_scale/")}
        if len(given) < len(wanted):  # an older checkpoint has one scale for both states of a layer
            self.lr_scale.fill_(1.0)
        self.put(given)

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what of `tensors` is given. Raises RuntimeError for a shape."""
        self._printed, mine = None, self.tensors()
        for key, tensor in tensors.items():
            mine[key].copy_(tensor)

    def _alike(self) -> dict[str, Tensor]:
        """What is the same on all holders."""
        return self.tensors()

    # ---- whether it is what it was ----

    def seal(self) -> None:
        """Nobody computes with it until the next step, so nobody else would see that a bit of it changes."""
        self._seal = self._sums()

    def unseal(self) -> None:
        """It may change from now on."""
        self._seal = None

    def require_intact(self) -> None:
        """Raise StateChanged where it is sealed and is not what it was then."""
        if self._seal is not None and not torch.equal(self._seal, self._sums()):
            raise StateChanged(f"layer {self.name} is not what step {self.version} has left: bits changed in memory")

    def _stored(self) -> list[Tensor]:
        """All of it, as it lies in memory."""
        return list(self.tensors().values())

    def _sums(self) -> Tensor:
        """Tensors as whole numbers, each added up: any bit that changes changes it, and it takes a tenth of the time
        of a checksum."""
        every = [tensor.detach().reshape(-1) for tensor in self._stored()]
        odd = [t.view(torch.uint8) for t in every if t.nbytes % 8 or t.data_ptr() % 8]
        sums = [t.view(torch.int64).sum() for t in every if not (t.nbytes % 8 or t.data_ptr() % 8)]
        found = [*sums, *(_weighed(torch.cat(each)) for each in _by_device(odd))]
        return torch.cat([torch.stack(each).cpu() for each in _by_device(found)])

    def fingerprint(self) -> int:
        """A checksum of what all holders have alike: equal on all of them, or one of them is wrong."""
        return self.fingerprints()[self.name]

    def fingerprints(self) -> dict[str, int]:
        """Checksums of all of it, by name: what has one name is equal on all who have it. They are computed once for a
        state that does not change: its sums say whether it has."""
        of, sums = (self.version, self.generation), self._sums()
        if self._printed is None or self._printed[0] != of or not torch.equal(self._printed[1], sums):
            self._printed = of, sums, self._fingerprints()
        return self._printed[2]

    def _fingerprints(self) -> dict[str, int]:
        alike = [tensor for _, tensor in sorted(self._alike().items())]
        here = [tensor for tensor in alike if tensor.device == self.gradient.device]
        begins = f"{self.version}/{self.generation}/{checksum(t for t in alike if t.device != self.gradient.device)}"
        return {self.name: checksum(here, begins)}


class LayerStates:
    """The states of some layers of one model, by name: what is saved, exported and filled in from a checkpoint.

    A file of a checkpoint has what one layer owns; a shared weight is in that of its owner, wherever it is computed.
    """

    def __init__(self, model: LayeredModel) -> None:
        self.model = model
        self.states: dict[str, LayerState] = {}

    def owned(self, layer: int) -> list[LayerState]:
        """Those of the states held that `layer` owns."""
        return [
            self.states[spec.name] for spec in self.model.states if spec.owner == layer and spec.name in self.states
        ]

    @property
    def owners(self) -> list[int]:
        """The layers that own what is held, ascending."""
        return sorted({spec.owner for spec in self.model.states if spec.name in self.states})

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """What the file of a layer has, not copied."""
        return {key: tensor for state in self.owned(layer) for key, tensor in state.tensors().items()}

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Full name -> weight of the parameters that a layer owns."""
        return {name: tensor for state in self.owned(layer) for name, tensor in state.weights().items()}

    def stamp(self, layer: int) -> tuple[int, int]:
        """The committed step and the generation that what a layer owns is of: the least, should they differ."""
        return min((state.version, state.generation) for state in self.owned(layer))

    def load(self, layer: int, tensors: Mapping[str, Tensor], step: int, generation: int) -> None:
        """Copy in what the file of a layer has, which is of this step and generation. Raises KeyError for a missing
        tensor, RuntimeError for a shape."""
        for state in self.owned(layer):
            state.load(tensors)
        stamp(self.owned(layer), step, generation)


def _weighed(few: Tensor) -> Tensor:
    """Bytes added up, each times its place."""
    return (few * torch.arange(1, few.numel() + 1, device=few.device)).sum()


def _by_device(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those on each device together."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return list(found.values())


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of all of them in one flat fp32 tensor of the host, in their order."""
    return torch.cat([tensor.detach().float().cpu().reshape(-1) for tensor in tensors.values()])


def unpacked(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` has made of tensors with these names and shapes, as views."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {key: part.view(tensor.shape) for (key, tensor), part in zip(like.items(), parts, strict=True)}


def stamp(states: Iterable[LayerState], step: int, generation: int) -> None:
    """These states are of this committed step and generation."""
    for state in states:
        state.version, state.generation = step, generation
        state.unseal()
