from diffalign.cli.options import FROM_FILE as FROM_FILE
