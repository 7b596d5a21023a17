// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <set>
#include <string>
#include <system_error>

namespace sluice::test {

// A folder that goes away with everything in it.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "sluice-test-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
    all().insert(path_);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    remove(path_);
    all().erase(path_);
  }
  // Before a test ends its process without unwinding.
  static void remove_all() {
    for (const std::string& path : all()) remove(path);
  }
  std::string path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  static std::set<std::string>& all() {
    static std::set<std::string> paths;
    return paths;
  }
  static void remove(const std::string& path) {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }

  std::string path_;
};

}  // namespace sluice::test
