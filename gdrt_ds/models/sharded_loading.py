"""Loads a model straight into its ZeRO-3 shards: no rank ever holds more than its slice and one tensor.

The usual path builds the whole quantised model on every rank and shards it afterwards (transformers
#24395, bitsandbytes
#1249, peft #2016), so a 70B model fails to start where it would fit. Here each rank
1. builds the skeleton without storage, with bitsandbytes' 4-bit modules in place;
2. reads from the safetensors files only the values that its slice of each parameter needs, widened to
whole 64-value blocks;
3. quantises these blocks (NF4 is block-wise: packed bytes and scales of a block do not depend on the others);
4. exchanges the float32 block scales in order and runs bitsandbytes' own nested quantisation on the whole
vector, because
   its offset is the mean over all blocks;
5. fills DeepSpeed's partition of the parameter directly.
Weights and quant_state are bitwise those of the usual path. Notation: a packed weight has S storage
elements of b bytes, two values per byte; rank r owns storage elements [r * ceil(S / world), (r + 1) *
ceil(S / world)).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.weight_files import WeightFiles

BLOCK, NESTED_BLOCK, QUANT_TYPE = 64, 256, "nf4"
PIECE = (
    4096 * BLOCK
)  # values read and quantised at once on a CPU, where bitsandbytes works with about 20 bytes per value


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
    """The model with every parameter already partitioned for ZeRO-3 on this rank.

    Raises:
        CannotShard: the model stores its weights in another form than its parameters, or the configuration
        needs the whole
            tensor (NVMe, hierarchical partitions, quantised communication).
        UserError: unreadable or incomplete weight files.
    """
    _check_engine(deepspeed_config)
    files = WeightFiles(path)
    model, quantizer = build_skeleton(path, config, section, dtype, attention, device)
    sources = match_names(model, files)
    if dtype in (torch.float16, torch.bfloat16) and model._get_dtype_plan(dtype):
        raise CannotShard(f"{type(model).__name__} keeps some parameters in float32")
    from deepspeed.runtime.zero.partition_parameters import Init

    zero = Init(config_dict_or_path=deepspeed_config, dtype=dtype)
    if zero.mem_efficient_linear:
        zero._enable_mem_efficient_linear()  # what deepspeed.initialize does to a model that it shards itself
    filled: dict[int, nn.Parameter] = {}  # tied parameters stay one object
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if parameter is None:
                continue
            if id(parameter) not in filled:
                if leaf == "weight" and is_4bit(module):
                    filled[id(parameter)] = quantized_parameter(
                        files, sources[name], module, dtype, section, device, zero
                    )
                else:
                    filled[id(parameter)] = plain_parameter(
                        files, sources[name], parameter.shape, dtype, device, zero
                    )
            module._parameters[leaf] = filled[id(parameter)]
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            value = buffer
            if name in sources and leaf not in module._non_persistent_buffers_set:
                value = files.read(sources[name]).view(buffer.shape).to(buffer.dtype)
            module._buffers[leaf] = value.to(device)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()


def _check_engine(deepspeed_config: dict) -> None:
    zero = deepspeed_config["zero_optimization"]
    if not dist.is_initialized():
        raise CannotShard("the process group is not started yet")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise CannotShard("parameters are offloaded to NVMe")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise CannotShard("zero_hpz_partition_size keeps a second partition")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        raise CannotShard("DeepSpeed's own weight quantisation is on")


def build_skeleton(
    path: Path, config, section: ModelSection, dtype: torch.dtype, attention: str, device: torch.device
):
    """(model whose parameters have shapes but no storage and whose buffers are real, quantiser or None)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.quantizers import AutoHfQuantizer

    from gdrt_ds.models.quantization import quantization_config

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
        )
    if section.quantization == "none":
        return model, None
    quantizer = AutoHfQuantizer.from_config(quantization_config(section, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": str(device)})
    model.tie_weights()
    return model, quantizer


def match_names(model: nn.Module, files: WeightFiles) -> dict[str, str]:
    """Parameter or persistent buffer -> name in the files; tied parameters once.

    Raises:
        CannotShard: a name or shape that transformers would convert while loading.
    """
    from transformers.pytorch_utils import Conv1D

    prefix = model.base_model_prefix + "."
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        for conversion in get_model_conversion_mapping(model):
            if isinstance(conversion, WeightConverter) and any(
                conversion.rename_source_key(name)[1] is not None for name in files.tensors
            ):
                raise CannotShard(
                    f"transformers converts the stored weights of {type(model).__name__} while loading"
                )
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sources = {}
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    wanted.update(
        {
            name: buffer.shape
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2]
            not in model.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
        }
    )
    for name, shape in wanted.items():
        stored = next((n for n in (name, name.removeprefix(prefix)) if n in files.tensors), None)
        if stored is None:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        stored_shape = files.tensors[stored].shape
        if is_4bit(module) and name.endswith(".weight"):
            shape = (module.out_features, module.in_features)
            stored_shape = stored_shape[::-1] if issubclass(module.source_cls, Conv1D) else stored_shape
        if tuple(stored_shape) != tuple(shape):
            raise CannotShard(f"{name} is stored as {list(stored_shape)}, the model has {list(shape)}")
        sources[name] = stored
    for target, source in tied.items():
        if target in sources and source in sources:
            raise CannotShard(f"{target} and {source} are tied but both stored")
        if target in sources or source in sources:
            sources.setdefault(source, sources.get(target))
            sources.setdefault(target, sources[source])
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise CannotShard(f"{len(missing)} parameters are not stored under their names, e.g. {missing[0]}")
    return sources


def is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


# ---------------------------------------------------------------------------------------------------- one
# parameter


def partition_range(numel: int, rank: int, world: int) -> tuple[int, int, int]:
    """(partition size, first, end) of a rank's elements in a flat tensor of `numel`.

    The last ranks may own less.
    """
    size = -(-numel // world)
    return size, min(rank * size, numel), min((rank + 1) * size, numel)


def block_range(first: int, end: int, numel: int) -> tuple[int, int]:
    """The range of values widened to whole quantisation blocks."""
    return first // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, numel)


def plain_parameter(
    files: WeightFiles, source: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, zero
) -> nn.Parameter:
    """A parameter that is not quantised: this rank's slice, in `dtype`."""
    parameter = nn.Parameter(_hollow(shape, dtype, device), requires_grad=False)
    zero._convert_to_deepspeed_param(parameter)
    size, first, end = partition_range(parameter.ds_numel, _rank(parameter), _world(parameter))
    partition = torch.zeros(size, dtype=dtype)
    partition[: end - first].copy_(files.read(source, first, end))
    _install(parameter, partition, dtype, device, zero)
    return parameter


def quantized_parameter(
    files: WeightFiles,
    source: str,
    module: nn.Module,
    dtype: torch.dtype,
    section: ModelSection,
    device: torch.device,
    zero,
) -> nn.Parameter:
    """A Params4bit whose packed bytes are partitioned and whose quant_state is whole on every rank."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise
    from bitsandbytes.nn import Params4bit
    from transformers.pytorch_utils import Conv1D

    old = module.weight
    shape = torch.Size((module.out_features, module.in_features))
    numel, storage = shape.numel(), old.quant_storage
    item = torch.empty((), dtype=storage).element_size()
    packed_bytes = (numel + 1) // 2
    if packed_bytes % item:
        raise CannotShard(f"{source}: {packed_bytes} packed bytes do not fill {storage} elements")
    parameter = Params4bit(
        _hollow((packed_bytes // item, 1), storage, device),
        requires_grad=False,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=storage,
        module=module,
        bnb_quantized=True,
    )
    zero._convert_to_deepspeed_param(parameter)
    rank, world = _rank(parameter), _world(parameter)
    size, first, end = partition_range(parameter.ds_numel, rank, world)
    own_first, own_end = first * item * 2, min(end * item * 2, numel)  # in values
    low, high = block_range(own_first, own_end, numel)
    partition = torch.zeros(
        size * item, dtype=torch.uint8
    )  # before what is temporary: a heap cannot shrink below what stays
    if issubclass(module.source_cls, Conv1D):  # stored transposed: the one tensor is read whole
        location = files.tensors[source]
        values = files.read(source).view(location.shape).t().reshape(-1)[low:high].clone()

        def read(start, stop):
            return values[start - low : stop - low]
    else:
        read = functools.partial(files.read, source)
    packed, absmax = quantize_range(read, low, high, dtype, device)
    skip = (own_first - low) // 2
    partition[: (end - first) * item].copy_(packed[skip : skip + (end - first) * item])
    absmax = gather_absmax(absmax, low // BLOCK, numel, packed_bytes, item, size, rank, world, parameter)
    state2, offset = None, None
    if section.double_quant:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = QuantState(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type(QUANT_TYPE, device=device),
        quant_type=QUANT_TYPE,
        offset=offset,
        state2=state2,
    )
    parameter.quant_state = module.quant_state = state
    _install(parameter, partition.view(storage), storage, device, zero)
    return parameter


def quantize_range(
    read, low: int, high: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` of the values [low, high) that `read(start, stop)` gives, in pieces on a CPU.

    An empty range gives empty tensors.
    """
    step = max(1, high - low) if device.type == "cuda" else PIECE
    done = [
        quantize_blocks(read(start, min(start + step, high)).to(dtype).to(device))
        for start in range(low, high, step)
    ]
    empty = torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, device=device)
    return tuple(torch.cat(parts) for parts in zip(*(done or [empty])))


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """(packed uint8[n / 2], absmax float32[blocks]) of whole blocks of a flat tensor."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(values, BLOCK, QUANT_TYPE, torch.uint8)
    return packed.view(-1), absmax.view(-1)


def owned_blocks(numel: int, packed_bytes: int, item: int, size: int, rank: int) -> tuple[int, int]:
    """Blocks whose first value lies in the rank's slice: every block has exactly one owner."""
    total = -(-numel // BLOCK)
    first, end = (min(r * size * item, packed_bytes) * 2 for r in (rank, rank + 1))
    return min(-(-first // BLOCK), total), min(-(-end // BLOCK), total)


def gather_absmax(
    absmax: Tensor,
    first_block: int,
    numel: int,
    packed_bytes: int,
    item: int,
    size: int,
    rank: int,
    world: int,
    parameter,
) -> Tensor:
    """float32[blocks of the whole tensor], the same on every rank, from each rank's owned blocks in order."""
    ranges = [owned_blocks(numel, packed_bytes, item, size, r) for r in range(world)]
    low, high = ranges[rank]
    if world == 1:
        return absmax
    width = max(end - start for start, end in ranges)
    mine = absmax.new_zeros(width)
    mine[: high - low].copy_(absmax[low - first_block : high - first_block])
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.cat([part[: end - start] for part, (start, end) in zip(parts, ranges)])


def _hollow(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape over one element of storage.

    DeepSpeed reads the shape, then the data are dropped.
    """
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _rank(parameter) -> int:
    return parameter.ds_zero_partition_rank


def _world(parameter) -> int:
    return parameter.ds_zero_partition_world_size


def _install(parameter, partition: Tensor, dtype: torch.dtype, device: torch.device, zero) -> None:
    """Leaves the parameter as DeepSpeed leaves it after partitioning.

    Own slice in ds_tensor, nothing in data.
    """
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
