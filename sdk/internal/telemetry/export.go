// The exporter that a program has linked: merlon.dev/sdk/otel registers it here, so
// that the SDK itself stays small, and it runs while an identity is open.

package telemetry

import (
	"log/slog"
	"sync"
)

// Exporter starts to export, and gives the function that ends it.
type Exporter func(*slog.Logger) (stop func())

var exporting struct {
	sync.Mutex
	exporter Exporter
	users    int
	stop     func()
}

// Register sets the exporter of this process.
func Register(e Exporter) {
	exporting.Lock()
	defer exporting.Unlock()
	exporting.exporter = e
}

// Export starts the exporter, if one is linked and does not run yet. After the last
// stop it has ended.
func Export(log *slog.Logger) (stop func()) {
	exporting.Lock()
	defer exporting.Unlock()
	if exporting.exporter == nil {
		return func() {}
	}
	if exporting.users == 0 {
		exporting.stop = exporting.exporter(log)
	}
	exporting.users++
	return sync.OnceFunc(func() {
		exporting.Lock()
		defer exporting.Unlock()
		exporting.users--
		if exporting.users == 0 {
			exporting.stop()
		}
	})
}
