"""Kinds of flags, for all scripts."""

import argparse
import math

from assets.plumbing.guard import within


def add_number(p, name, default, help, low, high=math.inf):
    """A flag for an int or a float, as its default is, from low to high."""
    kind = within(type(default), low, high)
    p.add_argument(name, type=kind, default=default, help=f"{help} [{default}]")


def add_choice(p, name, choices, help):
    """A flag for one of some words, the first by default."""
    p.add_argument(name, default=choices[0], choices=choices, help=f"{help} [{choices[0]}]")


def add_switch(p, name, help):
    switch = argparse.BooleanOptionalAction
    p.add_argument(name, action=switch, default=False, help=f"{help} [no]")
