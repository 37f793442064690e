"""Whether there is enough to train on; else one line says what is missing."""

from assets.plumbing.guard import InputError


def check_stage1(args, batches, valid_items):
    if {"ii", "ui"} & {*args.losses} and not len(batches.pairs.users):
        raise InputError(
            f"{args.data}: no user has two training items (4 interactions), as ii and ui need; "
            "use --losses itc itm itg"
        )
    if batches.with_text and (len(batches.items) < 2 or not valid_items):
        raise InputError(
            f"{args.data}: {len(batches.items)} training and {len(valid_items)} validation items "
            "with a text; item-text losses need 2 and 1; use --losses ii ui"
        )


def check_stage2(args, shares, users, validation):
    if not shares.sum():
        raise InputError(f"--mix 0 0 ...: {args.data} has no text task to train on")
    if shares[:2].any() and not len(users):
        raise InputError(
            f"{args.data}: no user has two training items, one to read and one to predict; "
            "users need 4 interactions"
        )
    if not validation:
        raise InputError(
            f"{args.data}: no text task of a validation item to choose a checkpoint by; "
            "--mix needs more than texts"
        )
