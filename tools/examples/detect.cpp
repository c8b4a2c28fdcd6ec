// Detects objects in an image with an exported detector, in C++. Prints a line for each object:
//
//     CLASS SCORE X1 Y1 X2 Y2
//
//     g++ -std=c++17 -O2 detect.cpp -I INCLUDE -L LIB -lonnxruntime -o detect
//     ./detect model.end_to_end.onnx image.ppm
//
// ONNX Runtime 1.23 or newer is needed: INCLUDE holds onnxruntime_cxx_api.h, LIB holds libonnxruntime.so; both are in
// its releases. (Debian's libonnxruntime-dev has the headers, and Python's onnxruntime the library, in its folder capi.)
//
// model.end_to_end.onnx is written by `export_model.py --end-to-end`. The image is a binary PPM, which is nothing but a
// size and RGB bytes (`convert photo.jpg -resize 800x800 image.ppm`): any other decoder that gives such bytes will do.
// It is to have the size at which the detector was trained, since nothing resizes it here; detector.json has that size.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> pixels;  // RGB, row by row
};

Image read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int largest = 0;
  Image image;
  // "P6", width, height and 255, apart by white space; then one byte of it, and the pixels.
  if (!(file >> kind >> image.width >> image.height >> largest) || kind != "P6" || largest != 255)
    throw std::runtime_error(std::string(path) + " is no binary PPM of 8 bits without comments");
  file.get();
  image.pixels.resize(image.width * image.height * 3);
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size()))
    throw std::runtime_error(std::string(path) + " ends too early");
  return image;
}

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: detect model.end_to_end.onnx image.ppm\n");
    return 2;
  }
  Image image = read_ppm(argv[2]);
  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "detect");
  Ort::Session session(environment, argv[1], Ort::SessionOptions());

  // One image of RGB bytes in; the objects of all images out, the surest first.
  const std::vector<int64_t> shape = {1, image.height, image.width, 3};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  auto images = Ort::Value::CreateTensor<uint8_t>(
      memory, image.pixels.data(), image.pixels.size(), shape.data(), shape.size());
  const char* inputs[] = {"images"};
  const char* outputs[] = {"boxes", "scores", "classes"};
  auto found = session.Run(Ort::RunOptions(), inputs, &images, 1, outputs, 3);

  const float* boxes = found[0].GetTensorData<float>();  // x1, y1, x2, y2 in pixels
  const float* scores = found[1].GetTensorData<float>();
  const int64_t* classes = found[2].GetTensorData<int64_t>();  // indices of the classes in detector.json
  const size_t count = found[1].GetTensorTypeAndShapeInfo().GetElementCount();
  for (size_t i = 0; i < count; i++, boxes += 4)
    std::printf("%d %.9g %.9g %.9g %.9g %.9g\n", static_cast<int>(classes[i]), scores[i], boxes[0], boxes[1], boxes[2], boxes[3]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
