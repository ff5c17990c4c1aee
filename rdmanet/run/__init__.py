"""``rdmanet run``: a job's processes in fresh pods of this host (docs/design/ml-jobs.md, "A job")."""
