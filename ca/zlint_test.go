// Leaves as others judge certificates.

package ca_test

import (
	"testing"

	"merlon.dev/integration/stage"
)

func TestZlintFindsNothingInLeaves(t *testing.T) {
	stage.CheckZlint(t, profiles(t))
}
