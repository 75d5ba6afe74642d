"""Lists the packages of the wheel; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["mae_et", "mae_et.*", "downstream", "downstream.*"]),
        *(f"mae_et.configs.{name}" for name in find_namespace_packages("configs", exclude=["*__pycache__*"])),
    ],
    package_dir={"mae_et.configs": "configs"},
)
