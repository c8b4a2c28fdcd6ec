"""Packaging of aqdet. ``bash tools/setup_env.sh`` installs it with pinned versions."""

from setuptools import find_packages, setup

setup(
    name="aqdet",
    version="0.1.0",
    description="Quantization-aware training of Detectron2 detectors with auxiliary heads",
    long_description=(
        "aqdet extends Detectron2 with DoReFa, PACT and LSQ quantization of dense object "
        "detectors down to 2 bits, trained with a full-precision auxiliary head that shares the "
        "quantized trunk and is dropped after training. Detectron2 itself is not on PyPI: build "
        "it from source, or run tools/install_detectron2.py for its Python part."
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
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["aqdet", "aqdet.*"]),
    package_data={"aqdet": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.11",
    install_requires=[
        "Pillow>=10",
        "defusedxml>=0.7",
        "fvcore>=0.1.5",
        "iopath>=0.1.7",
        "matplotlib>=3.7",
        "numpy>=1.24",
        "opencv-python>=4.7",
        "pycocotools>=2.0.6",
        "pyyaml>=6",
        "tabulate>=0.9",
        "tensorboard>=2.12",
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm>=4.60",
        "yacs>=0.1.8",
    ],
    extras_require={
        "eval": ["faster-coco-eval>=1.6"],
        "export": ["onnx>=1.16", "onnxruntime>=1.20"],
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
