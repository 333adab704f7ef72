"""Starts vLLM's API server: `python -m stages.vllm.api_server`.

Each process that the server spawns imports the module that was started. So this one imports nothing of vLLM before it
is run: with vLLM's own, the engine would import the whole API server, which takes a third of its start.
"""

from base.garbage import collect_rarely

# Here, so that it holds for spawned processes too.
collect_rarely()


def main() -> None:
    """Serve with the arguments of the command line."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
