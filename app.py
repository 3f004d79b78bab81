"""Starts the app: `python app.py`, the same as `diffalign demo`. The views live in diffalign/app/."""

from diffalign.app import main

if __name__ == "__main__":
    main()
