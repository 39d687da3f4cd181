// Trailers arrive after the decision; those that claim an identity are taken
// out before the handler can read them.

package httpauth

import (
	"io"
	"maps"
	"net/http"
)

// trailerFilter drops trailer fields whenever the body may just have ended.
type trailerFilter struct {
	io.ReadCloser
	trailer http.Header
	drop    func(name string, values []string) bool
}

// Read implements io.Reader.
func (f *trailerFilter) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if err != nil {
		maps.DeleteFunc(f.trailer, f.drop)
	}
	return n, err
}

// Close implements io.Closer. Closing reads what is left of the body, and so
// may bring trailers.
func (f *trailerFilter) Close() error {
	err := f.ReadCloser.Close()
	maps.DeleteFunc(f.trailer, f.drop)
	return err
}
