// What linking the SDK adds to a program: a figure of the plan (P11), which a
// careless import would break. With -trimpath both are smaller by the same; without
// it, the packages are those that other tests' binaries have compiled already.

package sdk_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"merlon.dev/integration/measure"
)

// mayAdd is what a server with the SDK may be larger by than one with go-spiffe.
const mayAdd = 3 << 20

func TestTheSDKAddsLittleToAProgram(t *testing.T) {
	t.Parallel()
	size := func(program string) int64 {
		out := filepath.Join(t.TempDir(), program)
		build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-s -w", "-o", out, "./testdata/hello/"+program)
		if said, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build of testdata/hello/%s: %v: %s", program, err, said)
		}
		info, err := os.Stat(out)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	with, without := size("merlon"), size("gospiffe")
	t.Logf("with the SDK %d bytes, with go-spiffe alone %d: %d more", with, without, with-without)
	measure.Print("ProgramSize", map[string]float64{"more-bytes": float64(with - without), "sdk-bytes": float64(with), "gospiffe-bytes": float64(without)})
	if with-without > mayAdd {
		t.Errorf("the SDK makes a program larger by %d bytes; at most %d (go list -deps ./testdata/hello/merlon says what is linked)", with-without, mayAdd)
	}
}
