package extauthz

import (
	"testing"
)

// A certificate that an Envoy passes on is one, or an error.
func FuzzCertificate(f *testing.F) {
	for _, s := range []string{"", "-----BEGIN%20CERTIFICATE-----%0AAA%3D%3D%0A-----END%20CERTIFICATE-----%0A", "%", "%zz", "-----BEGIN X-----\n-----END X-----\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, encoded string) {
		if cert, err := parse(encoded); (cert == nil) == (err == nil) {
			t.Fatalf("parse(%q) = %v, %v", encoded, cert, err)
		}
	})
}
