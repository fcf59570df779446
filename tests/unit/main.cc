// Catch2 3 brings its own main (Catch2Main, which pkg-config's catch2-with-main links).
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
#endif
