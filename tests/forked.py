"""All scripts, imported once: every call is a fork of this process, so that hundreds of true runs, with a status and a stderr of their
own, cost little more than their work. conftest.py's fixture `script` talks to it, a JSON object a line in each direction."""
import json
import os
import resource
import signal
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

MAINS = {"data.py": lambda: data.run_script(lambda: data.prepare(data.parse_args())), "ilm.py": lambda: ilm.run_script(ilm.main),
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


def child(call):
    os.chdir(call["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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
        return left.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def wait(pid, call):
    """Send call["signal"] after a time, or when a file has a text -> the status, negative where a signal ended it."""
    began = time.time()
    due = lambda: "signal" in call and (time.time() - began > call["after"] if "after" in call else
                                        Path(call["cwd"], call["when"][0]).exists()
                                        and call["when"][1] in Path(call["cwd"], call["when"][0]).read_text())
    while time.time() - began < 120:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due():
            os.kill(pid, call.pop("signal"))
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may exist when the process forks
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background was told to ignore it
    ilm.from_pretrained(ilm.AutoModelForCausalLM, str(data.Path(data.__file__).parent / "assets" / "toy_llm"), "--llm")  # its imports, once
    import transformers.models.bert.modeling_bert  # noqa: F401
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        if not (pid := os.fork()):
            status = child(call)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        print(json.dumps(wait(pid, call)), file=answers, flush=True)
