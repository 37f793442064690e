"""All scripts, imported once: every call is a fork of this process, so that hundreds of true runs, with a status and a stderr of their
own, cost little more than their work. conftest.py's fixture `script` talks to it, a JSON object a line in each direction.

Of a call: script, argv, cwd; before: code to run first; kill_at, largest_file: see below; signal: what to send `after` seconds, or
when a file has a text (`when`: file, text, how often [once]); ranks: so many processes of one run, of which the last gets the signal."""
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import ilm  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402

MAINS = {"data.py": lambda: data.run_script(data.main), "ilm.py": lambda: ilm.run_script(ilm.main),
         "evaluate.py": lambda: evaluate.run_script(evaluate.main), "train_stage1.py": lambda: train_stage1.run_training(train_stage1.main),
         "train_stage2.py": lambda: train_stage2.run_training(train_stage2.main)}


def killed_at(count):
    """From now on the process kills itself in place of its count-th rename, removal or new folder."""
    def wrap(name):
        original = getattr(os, name)

        def counted(*args, **kwargs):
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(os, name, counted)
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        wrap(name)


def child(call, rank):
    os.chdir(call["cwd"])
    os.environ.update({**call["environ"], "RANK": str(rank)})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    sys.argv = [call["script"], *call["argv"]]
    if call.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["largest_file"],) * 2)
    if call.get("kill_at"):
        killed_at(call["kill_at"])
    try:
        exec(call.get("before", ""), {})
        MAINS[call["script"]]()
        return 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return 1 if isinstance(left.code, str) else left.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def due(call, began):
    if "signal" not in call or "after" in call:
        return "signal" in call and time.time() - began > call["after"]
    name, text, times = [*call["when"], 1][:3]
    path = Path(call["cwd"], name)
    return path.exists() and path.read_text().count(text) >= times


def wait(pids, call):
    """Send call["signal"] to the last when it is due -> their statuses, negative where a signal ended one."""
    began, statuses = time.time(), {}
    while len(statuses) < len(pids) and time.time() - began < 120:
        for pid in (pid for pid in pids if pid not in statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if pids[-1] not in statuses and due(call, began):
            os.kill(pids[-1], call.pop("signal"))
        time.sleep(0.002)
    for pid in (pid for pid in pids if pid not in statuses):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        statuses[pid] = "hangs"
    return [statuses[pid] for pid in pids]


def fork(call, rank):
    if pid := os.fork():
        return pid
    status = child(call, rank)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def answer(call):
    """-> the status of a call, or the list of those of its `ranks`."""
    call["environ"], ranks = {}, call.get("ranks", 1)
    for name in ("out", "err"):
        open(call[name], "w").close()
    if "ranks" in call:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        call["environ"] = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    statuses = wait([fork(call, rank) for rank in range(ranks)], call)
    return statuses if "ranks" in call else statuses[0]


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may exist when the process forks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background was told to ignore it
    ilm.load_llm(str(data.Path(data.__file__).parent / "assets" / "toy_llm"), False, torch.device("cpu"))  # its imports, once
    import transformers.models.bert.modeling_bert  # noqa: F401
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
