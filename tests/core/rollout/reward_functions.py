"""What users write as rewards, good and bad: tests copy this file into a working directory as rewards.py."""

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import time


def texts(completions):
    return [one if isinstance(one, str) else one[0]["content"] for one in completions]


def size(completions, **columns):
    return [len(one) for one in texts(completions)]


def seen(completions, **columns):
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps({"completions": completions} | columns) + "\n")
    return [0.0] * len(completions)


def named(completions, level, half=0.5):
    return [number * half for number in level]


def ids_only(completion_ids):
    return [sum(ids) for ids in completion_ids]


def process(completions):
    time.sleep(0.2)
    return [os.getpid()] * len(completions)


def torch_is_there(completions):
    return ["torch" in sys.modules] * len(completions)


def talks(completions):
    print("from the reward")
    sys.stderr.write("and an error\n")
    return [len(sys.stdin.read())] * len(completions)


async def later(completions):
    await asyncio.sleep(0)
    return [len(one) for one in texts(completions)]


class Rubric:
    def __call__(self, completions, **columns):
        return [7] * len(completions)


rubric = Rubric()


def odd(completions):
    known = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "true": True, "list": [1.0], "two": 2}
    known["huge"] = 10**400
    return [known[one] for one in texts(completions)]


def short(completions):
    return [1.0] if len(completions) == 1 else [1.0] * (len(completions) - 1)


def scalar(completions):
    return 1.0


def abstains(completions):
    return [None] * len(completions)


def always(completions):
    raise KeyError("price")


def faulty(completions):
    out = []
    for one in texts(completions):
        if one == "hang":
            while True:
                time.sleep(1)
        if one == "exit":
            os._exit(7)
        if one == "segfault":
            ctypes.string_at(0)
        if one == "raise":
            raise ZeroDivisionError("no price")
        if one == "sys.exit":
            sys.exit(0)
        if one == "wait":
            time.sleep(1)
        if one == "loops":
            while True:
                pass
        out.append(float(len(one)))
    return out


def alarmed(completions):
    def late(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    out = []
    for one in texts(completions):
        signal.alarm(1)
        try:
            while one == "hang":
                time.sleep(0.01)
            out.append(1.0)
        except TimeoutError:
            out.append(-1.0)
    return out  # with the alarm still on


def patient(completions):
    time.sleep(1.3)
    return [1.0] * len(completions)


def starts(completions):
    child = subprocess.Popen(["sleep", "300"])
    with open("child.pid", "w") as file:
        file.write(str(child.pid))
    time.sleep(300)


def forks(completions):
    if "fork" in texts(completions):
        child = os.fork()
        if child == 0:
            return [9.0] * len(completions)
        with open("child.pid", "w") as file:
            file.write(str(child))
    time.sleep(0.2)
    return [1.0] * len(completions)


def slow(completions):
    time.sleep(0.25 * len(completions))
    return [1.0] * len(completions)


def leaves(completions, **columns):
    """Starts a sleeper in a session of its own, of which a shell between them forgets."""
    command = f'{sys.executable} -c \'import os, time; open("children", "a").write(str(os.getpid()) + " "); time.sleep(600)\' &'
    subprocess.Popen(command, shell=True, start_new_session=True).wait()
    if texts(completions)[0] == "hang":
        time.sleep(600)
    while not os.path.exists("children"):
        time.sleep(0.01)
    if texts(completions)[0] == "crash":
        os._exit(3)
    return [1.0 for _ in completions]


def prints(completions, **columns):
    for one in texts(completions):
        if one.isdigit():
            print("x" * int(one))
    return [1.0 for _ in completions]


def clears(completions, answer, **columns):
    """Empties what it is given."""
    count = len(completions)
    for given in (completions, answer, *columns.values()):
        given.clear()
    return [1.0] * count


def far(completions):
    from decimal import Decimal

    said = {"huge": 1e308, "below": -1e308, "digits": 10**5000, "whole": 10**20, "decimal": Decimal("1.5"), "true": True}
    return [said[one] for one in texts(completions)]


def by_place(completions, /):
    return [1.0 for _ in completions]


def alone():
    return [1.0]


def everything(*args):
    return [1.0]
