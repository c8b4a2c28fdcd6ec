"""Packaging of aqdet. ``bash tools/setup_env.sh`` installs it with pinned versions."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Programs of tools/ that are installed, as aqdet.programs; the ``aqdet`` command runs them (aqdet/main.py).
PROGRAMS = {"check_dataset", "convert_torchvision", "demo", "export_model", "plan", "report", "train_net"}


class BuildModules(build_py):
    """Leaves out the programs of tools/ that need a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module of a package."""
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if package != "aqdet.programs" or entry[1] in PROGRAMS]


setup(
    name="aqdet",
    version="0.1.0",
    description="Quantization-aware training of Detectron2 detectors with auxiliary heads",
    long_description=(
        "aqdet extends Detectron2 with DoReFa, PACT and LSQ quantization of dense object "
        "detectors down to 2 bits, trained with a full-precision auxiliary head that shares the "
        "quantized trunk and is dropped after training. By itself the package runs exported "
        "detectors, with ONNX Runtime; aqdet[train] trains them. Detectron2 itself is not on PyPI: "
        "build it from source, or run tools/install_detectron2.py for its Python part."
    ),
    long_description_content_type="text/plain",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["object detection", "quantization", "detectron2", "pytorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["aqdet", "aqdet.*"]), "aqdet.configs", "aqdet.programs"],
    package_dir={"aqdet.configs": "configs", "aqdet.programs": "tools"},
    package_data={"aqdet": ["py.typed"], "aqdet.configs": ["**/*.yaml", "README.md"]},
    cmdclass={"build_py": BuildModules},
    entry_points={"console_scripts": ["aqdet = aqdet.main:main"]},
    zip_safe=False,
    python_requires=">=3.11",
    # What an exported detector needs; the rest is in the extras.
    install_requires=["Pillow>=10.1", "numpy>=1.24", "onnxruntime>=1.23", "tqdm>=4.60"],
    extras_require={
        # Beside Detectron2, which is not on PyPI.
        "train": [
            "defusedxml>=0.7",
            "fvcore>=0.1.5",
            "iopath>=0.1.7",
            "matplotlib>=3.7",
            "opencv-python>=4.7",
            "pycocotools>=2.0.6",
            "pyyaml>=6",
            "tabulate>=0.9",
            "tensorboard>=2.12",
            "torch>=2.6",
            "torchvision>=0.21",
            "yacs>=0.1.8",
        ],
        "video": ["opencv-python>=4.7"],
        "eval": ["faster-coco-eval>=1.6"],
        "export": ["onnx>=1.16"],
        # Its executor and transformations, for who develops; the export itself writes QONNX without it.
        "qonnx": ["qonnx>=1.0"],
        "openvino": ["openvino>=2024.0"],
        "dev": [
            "faster-coco-eval>=1.6",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "types-PyYAML",
            "types-defusedxml",
            "types-tabulate",
            "types-tqdm",
        ],
    },
)
