"""One federated round: the protocol, the parts that a round is made of, and how they are run."""
