"""The eBPF datapath: source and compiler, artifacts, the loader and what the agent writes into its maps.

Nothing but ``compiler`` needs bcc; nodes load artifacts (docs/design/first-way.md, "eBPF").
"""
