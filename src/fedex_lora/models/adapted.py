"""A PEFT model whose base can take up a base delta: what a client trains, whoever runs the training loop."""

from collections.abc import Iterator, Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedex_lora.errors import TrainingError, UsageError, first_of
from fedex_lora.models.base_weights import FrozenBase, Where
from fedex_lora.models.core import core_start
from fedex_lora.models.fingerprint import frozen_samples
from fedex_lora.models.lora import format_of, lora_layers, other_parameters, read_model, read_other, train_in_float32, write_model
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.peft_rules import MARK, require_plain_lora
from fedex_lora.types import Adapter, Delta, LoRAPair


class AdaptedModel:
    """A PEFT model with LoRA, and the frozen base under it.

    Args:
        model: as `peft.get_peft_model` gives it, its adapter under any name; changed in place by `load`. What is trained becomes float32.
        where: "auto" folds the base delta into float32 weights and keeps it beside others; "fold" or "side" does one of them everywhere.

    Raises:
        AdapterError, ModelError: an adapter or a base that the algebra does not cover (DoRA, PiSSA, trained biases).
        UsageError: no model; adapters without a `PeftModel`, or merged; or a model of `load_model` whose base had gained something.

    Example:
        >>> model = AdaptedModel(get_peft_model(base, LoraConfig(r=8)))                   # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, where: Where = "auto") -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"AdaptedModel takes a model, as peft.get_peft_model gives it, and this is a {type(model).__name__}")
        if isinstance(model, PeftModel):
            require_plain_lora(model.peft_config[model.active_adapter].to_dict(), "the adapter of this model")
            if any(getattr(config, MARK, "") for config in model.peft_config.values()):
                raise UsageError(
                    "AdaptedModel takes a model on a plain base, and load_model gave this one what its base had gained: go on by run with "
                    "base.start, by aggregate(..., state=...), or from what `fedex-lora export --as base+adapter` writes"
                )
        elif any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UsageError(
                f"AdaptedModel takes what peft.get_peft_model gives, and this is a {type(model).__name__} with adapters in it: wrap the "
                "plain base by get_peft_model(base, LoraConfig(...))"
            )
        if any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
            raise UsageError("the adapters of this model are merged into its base: call unmerge_adapter() first")
        train_in_float32(model)
        self.model, self.base = model, FrozenBase(model, where)
        self._frozen = dict[str, bytes]()
        self._dtypes = {name: parameter.dtype for name, parameter in self._trained()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their module's name (of factors) or by their own."""
        for name, layer in lora_layers(self.model).items():
            yield from ((name, layer.parameter(part)) for part in layer.parts if part != "U")
        yield from other_parameters(self.model).items()

    def load(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> str:
        """Write in the factors to train, what the frozen base has gained, and the other trained tensors.

        Parameters that a trainer made to another dtype (TRL's do, to bf16, over a base of 4 or 8 bits) get theirs back before it.

        Returns:
            What its base is called: see `FrozenBase.name`.

        Raises:
            ModelError, AdapterError: they do not fit the model.
        """
        name = self.base.name
        for key, parameter in self._trained():
            parameter.data = parameter.data.to(self._dtypes.get(key, parameter.dtype))
        self.base.set(delta)
        write_model(self.model, start, other)
        self._frozen = frozen_samples(self.model)
        return name

    def read(self) -> tuple[Adapter, Mapping[str, Tensor]]:
        """Copies of the factors and of the other trained tensors, on the CPU, of the dtype that they had at first.

        Raises:
            TrainingError: since `load` something has changed that is frozen, as far as samples show it: it would stay with this party.
        """
        now = frozen_samples(self.model) if self._frozen else {}
        if odd := [name for name, sample in now.items() if self._frozen.get(name, sample) != sample]:
            raise TrainingError(
                f"the training changed {first_of(odd)}, which is frozen: train the adapter and modules_to_save only, with batch "
                "normalisation in eval()"
            )
        adapter = {name: self._as_at_first(name, pair) for name, pair in read_model(self.model).items()}
        return adapter, {name: tensor.to(self._dtypes.get(name, tensor.dtype)) for name, tensor in read_other(self.model).items()}

    def _as_at_first(self, module: str, pair: LoRAPair) -> LoRAPair:
        parts = {part: tensor.to(self._dtypes.get(module, tensor.dtype)) for part, tensor in pair.parts.items()}
        return type(pair)(**parts, scaling=pair.scaling)

    def cores(self) -> Adapter:
        """What a run of a method that trains cores starts from: see `core_start`. The model stays as it is."""
        return core_start(self.base.pristine, read_model(self.model))

    @property
    def format(self) -> Format:
        """How its adapter is written: see `save_result`."""
        return format_of(self.model)
