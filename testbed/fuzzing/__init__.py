"""Hostile input by mutation: seeds are changed at random, and what reaches new code is kept and changed further."""
