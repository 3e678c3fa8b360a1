"""`python -m exaone_bridge.recipes`: the table of docs/recipes.md."""

from exaone_bridge.recipes.table import table

if __name__ == "__main__":
    print(table())
