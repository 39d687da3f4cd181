// Package federation_test has two trust domains as processes whose programs call each other, and
// the endpoints and clients of other implementations.
package federation_test

import (
	"testing"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}
