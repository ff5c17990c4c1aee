"""The compiled datapath without an agent: maps filled by hand, programs run on packets, verdicts compared."""
