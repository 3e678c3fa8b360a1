"""`python -m exaone_bridge.recipes` prints the table of docs/recipes.md."""

from exaone_bridge.recipes.table import plan_table

if __name__ == "__main__":
    print(plan_table())
