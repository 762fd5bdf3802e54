def add_cost(c):
    pass


def add_tune(c):
    pass
