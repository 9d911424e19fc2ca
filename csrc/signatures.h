// The types of what operators take and return, which Python compares with their schemas.
#pragma once

#include <map>
#include <string>

namespace fastkd {

inline std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

}  // namespace fastkd
