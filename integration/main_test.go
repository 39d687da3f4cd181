// Package integration_test starts the real binaries and looks at them from
// outside, as operators and workloads do.
package integration_test

import (
	"testing"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}
