"""Packaging of aqdet. ``bash tools/setup_env.sh`` installs it with pinned versions."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Programs of tools/ that are installed, as aqdet.programs; the ``aqdet`` command runs them (aqdet/main.py).
PROGRAMS = {"check_dataset", "convert_torchvision", "demo", "export_model", "plan", "quantize", "report", "train_net"}


class BuildModules(build_py):
    """Leaves out the programs of tools/ that need a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module of a package."""
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if package != "aqdet.programs" or entry[1] in PROGRAMS]


setup(
    name="aqdet",
    version="0.1.0",
    description="Object detectors at 4 bits and below, trained on Detectron2 with a full-precision auxiliary path",
    long_description=(
        "aqdet trains quantized object detectors (RetinaNet, FCOS, Faster and Mask R-CNN) on Detectron2 with weights "
        "and activations of 2 to 8 bits: LSQ, LSQ+, PACT, DoReFa, LQ-Nets and N2UQ, and a full-precision auxiliary "
        "path that reads the quantized backbone during training and is gone from what is evaluated and shipped. By "
        "itself the package runs exported detectors, with ONNX Runtime; aqdet[train,export] trains and exports them. "
        "Detectron2 itself is not on PyPI: build it from source, or run tools/install_detectron2.py for its Python "
        "part."
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
    package_data={
        "aqdet": ["py.typed"],
        "aqdet.report": ["templates/*"],
        "aqdet.configs": ["**/*.yaml", "LazyConfig/*.py", "README.md"],
        "aqdet.programs": ["examples/*"],
    },
    cmdclass={"build_py": BuildModules},
    entry_points={"console_scripts": ["aqdet = aqdet.main:main"]},
    zip_safe=False,
    python_requires=">=3.11",
    # An exported detector needs no more than these; training, export and development have extras.
    install_requires=["Pillow>=10.1", "numpy>=1.24", "onnxruntime>=1.23", "tqdm>=4.60"],
    extras_require={
        # Detectron2 is needed too, and is not on PyPI.
        "train": [
            "defusedxml>=0.7",
            "fvcore>=0.1.5",
            "iopath>=0.1.7",
            "jinja2>=3.1",
            "matplotlib>=3.7",
            "opencv-python>=4.7",
            "pycocotools>=2.0.6",
            "pyyaml>=6",
            "scipy>=1.11",
            "tabulate>=0.9",
            "tensorboard>=2.12",
            "torch>=2.6",
            "torchvision>=0.21",
            "yacs>=0.1.8",
        ],
        "video": ["opencv-python>=4.7"],
        "eval": ["faster-coco-eval>=1.6"],
        "export": ["onnx>=1.16"],
        # QONNX's executor and transformations, for development; the export writes QONNX files without them.
        "qonnx": ["qonnx>=1.0"],
        "openvino": ["openvino>=2024.0"],
        # Post-training quantization by others, for benchmark.py export.
        "nncf": ["nncf>=2.13", "openvino>=2024.0"],
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
