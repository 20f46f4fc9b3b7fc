"""Whether an implementation of ε-DPO does what the paper says, clause by clause, by what can be seen from outside."""
