"""Loads a model straight into its ZeRO-3 shards: no rank ever holds more than its slice and one tensor.

The usual path builds the whole quantised model on every rank and shards it afterwards (transformers #24395,
bitsandbytes #1249, peft #2016), so a 70B model fails to start where it would fit. Here each rank
1. builds the skeleton without storage, with bitsandbytes' 4-bit modules in place;
2. reads from the safetensors files only the values that its slice of each parameter needs, widened to whole
   blocks of 64 values;
3. quantises these blocks (NF4 is block-wise: packed bytes and scales of a block do not depend on the others);
4. exchanges the float32 block scales in order and runs bitsandbytes' own nested quantisation on the whole
   vector, because its offset is the mean over all blocks;
5. fills DeepSpeed's partition of the parameter directly.
A checkpoint that is 4-bit already is read without steps 3 and 4: its packed bytes by slice, its scales whole.
Weights and quant_state are bitwise those of the usual path.

Notation: a packed weight has S storage elements of `item` bytes, and a byte holds two values. Rank r owns the
storage elements [r * size, (r + 1) * size) with size = ceil(S / world).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.families import weight_converters, weight_renamings
from gdrt_ds.models.quantised_slices import (
    Packed,
    block_range,
    gather_absmax,
    partition_range,
    quant_state_of,
    quantize_range,
)
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.quantization.nf4 import BLOCK, is_4bit
from gdrt_ds.models.stored_four_bit import is_packed, read_quant_state, stored_four_bit
from gdrt_ds.models.weight_files import TensorLocation, WeightFiles


class CannotShard(Exception):
    """Why this model or configuration takes the usual path; the text is announced."""


def load_sharded(
    path: Path,
    config,
    section: ModelSection,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    deepspeed_config: dict,
) -> nn.Module:
    """Returns the model with every parameter already partitioned for ZeRO-3 on this rank.

    Args:
        path: folder of the base.
        config: its transformers config.
        section: settings of the model.
        dtype: dtype of the computation.
        attention: transformers' name of the attention.
        device: where the slices go, unless the DeepSpeed config offloads them.
        deepspeed_config: the filled DeepSpeed config, of ZeRO stage 3.

    Raises:
        CannotShard: the model stores its weights in another form than its parameters, or the configuration
            needs the whole tensor (NVMe, quantised communication).
        UserError: the weight files are unreadable or incomplete.
    """
    model, quantizer, files, sources = _matched(
        path, config, section, dtype, attention, device, deepspeed_config
    )
    if not dist.is_initialized():
        raise CannotShard("the process group is not started yet")
    from deepspeed.runtime.zero.partition_parameters import Init

    group = secondary_group(deepspeed_config)
    zero = Init(config_dict_or_path=deepspeed_config, dtype=dtype, zero_param_parallel_group=group)
    if zero.mem_efficient_linear:
        zero._enable_mem_efficient_linear()  # what deepspeed.initialize does to a model that it shards itself
    filler = Filler(files, sources, dtype, section.double_quant, device, zero)
    for name, module in model.named_modules():
        filler.fill_parameters(name, module)
        filler.fill_buffers(name, module)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()


def sharding_obstacle(
    path: Path, config, section: ModelSection, dtype: torch.dtype, deepspeed_config: dict
) -> str:
    """Why `load_sharded` would take the usual path; empty where it would not. It reads no weight.

    Arguments: see `load_sharded`.

    Raises:
        UserError: the weight files are unreadable or incomplete.
    """
    try:
        _matched(path, config, section, dtype, None, torch.device("cpu"), deepspeed_config)
    except CannotShard as reason:
        return str(reason)
    return ""


def _matched(
    path: Path,
    config,
    section: ModelSection,
    dtype: torch.dtype,
    attention: str | None,
    device: torch.device,
    deepspeed_config: dict,
):
    """Returns skeleton, quantiser, weight files, and parameter -> its name in the files.

    Raises:
        CannotShard, UserError: see `load_sharded`.
    """
    if not get_quantization(section.quantization).loads_sharded:
        raise CannotShard(f"model.quantization = {section.quantization} needs whole weights")
    _check_engine(deepspeed_config)
    files = WeightFiles(path)
    model, quantizer = build_skeleton(path, config, section, dtype, attention, device)
    sources = match_names(model, files)
    if dtype in (torch.float16, torch.bfloat16) and model._get_dtype_plan(dtype):
        raise CannotShard(f"{type(model).__name__} keeps some parameters in float32")
    return model, quantizer, files, sources


def _check_engine(deepspeed_config: dict) -> None:
    zero = deepspeed_config["zero_optimization"]
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise CannotShard("parameters are offloaded to NVMe")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        raise CannotShard("DeepSpeed's own weight quantisation is on")


def secondary_group(deepspeed_config: dict):
    """Returns the ranks that share a second copy of the slices (zero_hpz_partition_size), or None.

    DeepSpeed fills the second slice of a parameter itself, the first time it frees that parameter. From then
    on a frozen weight is gathered within this group, for instance within a node, and not over all ranks.
    """
    size = deepspeed_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    if size <= 1:
        return None
    from deepspeed.utils import groups

    if groups._get_zero_param_intra_parallel_group() is None:  # a process may load several models
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def build_skeleton(
    path: Path, config, section: ModelSection, dtype: torch.dtype, attention: str | None, device: torch.device
):
    """Returns a model whose parameters have no storage and whose buffers are real, and the quantiser.

    The quantiser is transformers'; it is None for a base that is not quantised.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.quantizers import AutoHfQuantizer

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
        )
    packed_already = stored_four_bit(config) is not None
    if packed_already:
        quantization_config = config.quantization_config
    else:
        quantization_config = get_quantization(section.quantization).transformers_config(section, dtype)
    if quantization_config is None:
        return model, None
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=packed_already)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": str(device)})
    model.tie_weights()
    return model, quantizer


def match_names(model: nn.Module, files: WeightFiles) -> dict[str, str]:
    """Returns parameter or persistent buffer -> its name in the files; tied parameters share one name.

    Raises:
        CannotShard: a name or shape that transformers would convert while loading.
    """
    _refuse_conversions(model, files)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, buffer in model.named_buffers():
        module, leaf = _owner(model, name)
        if leaf not in module._non_persistent_buffers_set:
            wanted[name] = buffer.shape
    prefix = model.base_model_prefix + "."
    stored_as = _stored_names(model, files, wanted)
    sources = {}
    for name, shape in wanted.items():
        # Some checkpoints were saved from the backbone alone: their names lack its prefix.
        stored = next((stored_as[n] for n in (name, name.removeprefix(prefix)) if n in stored_as), None)
        if stored is None:
            continue
        if is_packed(files, stored):
            _check_packed(model, name, files.tensors[stored])
        else:
            _check_shape(model, name, shape, files.tensors[stored].shape)
        sources[name] = stored
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in sources and source in sources:
            raise CannotShard(f"{target} and {source} are tied but both stored")
        if target in sources or source in sources:
            sources.setdefault(source, sources.get(target))
            sources.setdefault(target, sources[source])
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise CannotShard(f"{len(missing)} parameters are not stored under their names, e.g. {missing[0]}")
    return sources


def _stored_names(model: nn.Module, files: WeightFiles, wanted: Container[str]) -> dict[str, str]:
    """Returns name in the model -> name in the files; they differ where transformers renames while loading.

    Multimodal models are stored under the names of an earlier layout of their modules.

    Args:
        wanted: the names in the model.

    Raises:
        CannotShard: two stored tensors are one of the model's.
    """
    renamings = weight_renamings(model)
    names: dict[str, str] = {}
    for stored in files.tensors:
        name = stored
        for rule in renamings:
            name, _ = rule.rename_source_key(name)
        if name not in wanted and stored in wanted:  # as transformers has it
            name = stored
        if name in names and name in wanted:
            raise CannotShard(f"{names[name]} and {stored} are both {name}")
        names[name] = stored
    return names


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    module_name, _, leaf = name.rpartition(".")
    return model.get_submodule(module_name), leaf


def _refuse_conversions(model: nn.Module, files: WeightFiles) -> None:
    """Raises CannotShard if this transformers converts the stored weights while loading."""
    for rule in weight_converters(model):
        if any(rule.rename_source_key(name)[1] is not None for name in files.tensors):
            raise CannotShard(
                f"transformers converts the stored weights of {type(model).__name__} while loading"
            )


def _check_shape(model: nn.Module, name: str, shape: torch.Size, stored_shape: tuple[int, ...]) -> None:
    """Raises CannotShard if a tensor is stored in another shape than the model has."""
    from transformers.pytorch_utils import Conv1D

    module, leaf = _owner(model, name)
    if leaf == "weight" and is_4bit(module):
        shape = (module.out_features, module.in_features)
        if issubclass(module.source_cls, Conv1D):
            stored_shape = stored_shape[::-1]
    if tuple(stored_shape) != tuple(shape):
        raise CannotShard(f"{name} is stored as {list(stored_shape)}, the model has {list(shape)}")


def _check_packed(model: nn.Module, name: str, stored: TensorLocation) -> None:
    """Raises CannotShard if a packed weight does not fill its 4-bit layer."""
    module, _ = _owner(model, name)
    if not is_4bit(module):
        raise CannotShard(f"{name} is stored in 4 bits, and the model has a {type(module).__name__} there")
    wanted = (module.out_features * module.in_features + 1) // 2
    found = stored.numel * _bytes_of_one(stored.dtype)
    if found != wanted or stored.dtype != module.weight.quant_storage:
        raise CannotShard(f"{name} is stored as {found} bytes of {stored.dtype}, its layer packs {wanted}")


@dataclass
class Filler:
    """Puts this rank's slices into the parameters of a skeleton.

    Attributes:
        files: the stored tensors.
        sources: parameter or buffer -> name in the files.
        dtype: dtype of the computation.
        double_quant: whether the block scales are quantised too.
        device: where the slices go.
        zero: DeepSpeed's `Init`, which turns a tensor into a partitioned parameter.
    """

    files: WeightFiles
    sources: dict[str, str]
    dtype: torch.dtype
    double_quant: bool
    device: torch.device
    zero: object

    def __post_init__(self):
        self._filled: dict[int, nn.Parameter] = {}  # tied parameters stay one object

    def fill_parameters(self, module_name: str, module: nn.Module) -> None:
        """Replaces the parameters that the module itself holds."""
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in self._filled:
                source = self.sources[f"{module_name}.{leaf}" if module_name else leaf]
                if leaf == "weight" and is_4bit(module):
                    self._filled[id(parameter)] = self.quantized_parameter(source, module)
                else:
                    self._filled[id(parameter)] = self.plain_parameter(source, parameter.shape)
            module._parameters[leaf] = self._filled[id(parameter)]

    def fill_buffers(self, module_name: str, module: nn.Module) -> None:
        """Moves the module's own buffers to the device; stored ones are read."""
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            value = buffer
            if name in self.sources and leaf not in module._non_persistent_buffers_set:
                value = self.files.read(self.sources[name]).view(buffer.shape).to(buffer.dtype)
            module._buffers[leaf] = value.to(self.device)

    def plain_parameter(self, source: str, shape: torch.Size) -> nn.Parameter:
        """Returns a parameter that is not quantised: this rank's slice, in the dtype of the computation."""
        parameter = nn.Parameter(_hollow(shape, self.dtype, self.device), requires_grad=False)
        self.zero._convert_to_deepspeed_param(parameter)
        size, first, end = partition_range(parameter.ds_numel, _rank(parameter), _world(parameter))
        partition = torch.zeros(size, dtype=self.dtype)
        partition[: end - first].copy_(self.files.read(source, first, end))
        _install(parameter, partition, self.dtype, self.device, self.zero)
        return parameter

    def quantized_parameter(self, source: str, module: nn.Module) -> nn.Parameter:
        """Returns a Params4bit: its packed bytes are partitioned, its quant_state is whole on every rank."""
        storage = module.weight.quant_storage
        parameter = self._hollow_4bit(source, module)
        self.zero._convert_to_deepspeed_param(parameter)
        rank = _rank(parameter)
        world = _world(parameter)
        size, _, _ = partition_range(parameter.ds_numel, rank, world)
        item = _bytes_of_one(storage)
        if is_packed(self.files, source):
            _, first, end = partition_range(parameter.ds_numel, rank, world)
            partition = torch.zeros(size, dtype=storage)
            partition[: end - first].copy_(self.files.read(source, first, end))
            self._finish_4bit(parameter, module, partition, read_quant_state(self.files, source, self.device))
            return parameter
        layout = Packed(module.out_features * module.in_features, item, size, rank, world)
        # The slice that stays is made before anything temporary: a heap cannot shrink below what stays.
        partition = torch.zeros(size * item, dtype=torch.uint8)
        own_first, own_end = layout.own_values
        low, high = block_range(own_first, own_end, layout.numel)
        read = self._reader(source, module, low, high)
        packed, absmax = quantize_range(read, low, high, self.dtype, self.device)
        first_byte, end_byte = layout.own_bytes
        skip = (own_first - low) // 2
        partition[: end_byte - first_byte].copy_(packed[skip : skip + end_byte - first_byte])
        absmax = gather_absmax(absmax, low // BLOCK, layout)
        shape = torch.Size((module.out_features, module.in_features))
        state = quant_state_of(absmax, shape, self.double_quant, self.dtype, self.device)
        self._finish_4bit(parameter, module, partition.view(storage), state)
        return parameter

    def _finish_4bit(self, parameter, module: nn.Module, partition: Tensor, state) -> None:
        """Gives a packed parameter its quant_state and this rank's slice."""
        parameter.quant_state = state
        module.quant_state = state
        _install(parameter, partition, partition.dtype, self.device, self.zero)

    def _hollow_4bit(self, source: str, module: nn.Module):
        """A Params4bit in the packed shape, without storage."""
        from bitsandbytes.nn import Params4bit

        old = module.weight
        packed_bytes = (module.out_features * module.in_features + 1) // 2
        item = _bytes_of_one(old.quant_storage)
        if packed_bytes % item:
            raise CannotShard(
                f"{source}: {packed_bytes} packed bytes do not fill {old.quant_storage} elements"
            )
        return Params4bit(
            _hollow((packed_bytes // item, 1), old.quant_storage, self.device),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=module,
            bnb_quantized=True,
        )

    def _reader(self, source: str, module: nn.Module, low: int, high: int) -> Callable[[int, int], Tensor]:
        """A function (start, stop) -> the values of the weight [out, in], flattened, within [low, high)."""
        from transformers.pytorch_utils import Conv1D

        if not issubclass(module.source_cls, Conv1D):
            return functools.partial(self.files.read, source)
        # GPT-2's Conv1D is stored transposed, so this one tensor is read whole.
        location = self.files.tensors[source]
        values = self.files.read(source).view(location.shape).t().reshape(-1)[low:high].clone()

        def read(start: int, stop: int) -> Tensor:
            return values[start - low : stop - low]

        return read


def _bytes_of_one(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _hollow(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape over one element of storage: DeepSpeed reads its shape and drops its data."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _rank(parameter) -> int:
    return parameter.ds_zero_partition_rank


def _world(parameter) -> int:
    return parameter.ds_zero_partition_world_size


def _install(parameter, partition: Tensor, dtype: torch.dtype, device: torch.device, zero) -> None:
    """Leaves the parameter as DeepSpeed does: its own slice in ds_tensor, nothing in data."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    remote = torch.device("cpu") if str(zero.remote_device) == "cpu" else device
    partition = partition.to(remote)
    if remote.type == "cpu" and zero.pin_memory:
        from deepspeed.accelerator import get_accelerator

        partition = get_accelerator().pin_memory(partition)
    parameter.ds_tensor = partition
    partition.ds_numel = partition.numel()
    partition.status = PartitionedParamStatus.AVAILABLE
    partition.final_location = None
    parameter.ds_numel_aligned = partition.numel() * _world(parameter)
    parameter.data = torch.empty(0, dtype=dtype, device=device)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
