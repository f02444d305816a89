"""Measures what serve.py's layer around vLLM costs: the same requests to vLLM's own server and to ours, by turns.

    python benchmarks/bench_layer.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 \
        --vllm_python .venv-vllm/bin/python

Both servers stay up, with the same settings, and the turns are short, so that what else the machine does meets both.
Prints tokens a second of each turn, the median of their ratios, and the seconds of CPU that the process which speaks
HTTP took in all; that of vLLM's engine is another one.
"""

import argparse
import asyncio
import statistics
from contextlib import ExitStack

import psutil
from bench_serve import SERVERS, ask, crowd

SYSTEMS = ("vLLM", "serve.py, vLLM")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm_python", required=True, help="the Python of vLLM's environment")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1, help="of each client in a turn")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--turns", type=int, default=12, help="of each server")
    return parser


def listener(port: int) -> psutil.Process:
    """The process behind a port of this machine."""
    return next(
        one
        for one in psutil.Process().children()
        for connection in one.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    )


def cpu_sec(server: psutil.Process) -> float:
    """What a process took, without those that it started."""
    times = server.cpu_times()
    return times.user + times.system


def main(args: argparse.Namespace) -> None:
    """Measures by turns."""
    with ExitStack() as stack:
        ports = {system: stack.enter_context(SERVERS[system](args)) for system in SYSTEMS}
        servers = {system: listener(port) for system, port in ports.items()}
        for port in ports.values():  # The first request takes longer than others.
            asyncio.run(ask(port, "m", -1, args.tokens))
        before = {system: cpu_sec(server) for system, server in servers.items()}
        speeds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for turn in range(args.turns):
            for system in SYSTEMS if turn % 2 else SYSTEMS[::-1]:
                found, seconds = asyncio.run(crowd(ports[system], "m", args.clients, args, 1000 * turn))
                speeds[system].append(sum(one.tokens for one in found) / seconds)
                print(f"turn {turn}, {system}: {speeds[system][-1]:.1f} tokens/s", flush=True)
        spent = {system: cpu_sec(server) - before[system] for system, server in servers.items()}
    bare, ours = (speeds[system] for system in SYSTEMS)
    ratios = sorted(one / other for one, other in zip(ours, bare, strict=True))
    count = args.turns * args.clients * args.requests
    print(f"\nserve.py to vLLM's own server, tokens/s: median {statistics.median(ratios):.3f}", end=" ")
    print(f"({ratios[0]:.3f} to {ratios[-1]:.3f}), of all {statistics.mean(ours) / statistics.mean(bare):.3f}")
    for system, seconds in spent.items():
        print(f"{system}: {seconds:.1f} s of CPU in the process that speaks HTTP, for {count} requests")


if __name__ == "__main__":
    main(build_parser().parse_args())
