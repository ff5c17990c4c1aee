"""Where the tests run: the machine's own kernel where it can, a throwaway virtual machine elsewhere."""
