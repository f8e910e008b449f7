"""A process that has imported everything once, and forks a real process for every command.

Starting Python with torch takes longer than what is killed here. Requests come as lines of JSON:
``{"argv": [...], "cwd": ..., "env": {...}, "log": ..., "fault": {...} or null}`` is answered with
``{"pid": ...}``, and ``{"wait": pid}`` with ``{"code": ...}``, which is -9 after SIGKILL.
"""

import json
import os
import sys
import traceback

import fault_events


def main() -> None:
    import accelerate
    import datasets
    import peft
    import torch
    import transformers.trainer

    import unlora.cli.report
    import unlora.evals
    import unlora.recipes.evaluate
    import unlora.recipes.train
    import unlora.trainer

    assert all((accelerate, datasets, peft, torch, transformers, unlora))
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                child(request)
        print(json.dumps(answer), flush=True)


def child(request) -> None:
    """Run one command as ``unlora`` would; never returns."""
    from unlora.cli.main import main as unlora_main

    code = 1
    try:
        log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = ["unlora", *request["argv"]]
        events = fault_events.install(request["fault"])
        try:
            unlora_main(request["argv"])
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        events.write()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
