"""The option that names unpacked wheels of vLLM to check besides the one installed."""


def pytest_addoption(parser):
    parser.addoption(
        "--vllm-source",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder that holds an unpacked vLLM (DIR/vllm and DIR/vllm-*.dist-info); repeatable",
    )
