"""The paper, table by table, from runs of its experiments."""
