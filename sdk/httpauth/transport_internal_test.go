// What a Transport leaves behind.

package httpauth

import (
	"runtime"
	"testing"
	"time"
	"weak"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// The Identity calls it at each rotation; that alone must not keep it, or whoever makes
// a Client for each call grows for ever.
func TestTransportThatNobodyHasIsNotKept(t *testing.T) {
	id := sdktest.New(t).Workload("web")
	made := weak.Make(Transport(id, sdk.Service("orders")).(*transport))
	for deadline := time.Now().Add(30 * time.Second); made.Value() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a Transport is kept that nobody has")
		}
		runtime.GC()
	}
}
