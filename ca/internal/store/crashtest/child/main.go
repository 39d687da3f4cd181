// Command child drives a store until somebody kills it; see package crashtest.
// Tests run it in place of themselves when they need a build with changed
// sources.
package main

import (
	"os"

	"merlon.dev/ca/internal/store/crashtest"
)

func main() {
	os.Exit(crashtest.Child()) //nolint:forbidigo // the main of a child process
}
