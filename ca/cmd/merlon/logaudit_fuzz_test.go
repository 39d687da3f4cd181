package main

import (
	"encoding/pem"
	"testing"

	"merlon.dev/sdk/svid/forge"
)

// What is read of a file as SVIDs has a serial to look up and the hash of what was
// signed, and nothing else is an SVID.
func FuzzShownIn(f *testing.F) {
	authority := forge.New(f, "example.test")
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Leaf("/web").Chain[0].Raw})
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Cert.Raw})
	for _, content := range [][]byte{
		append(append([]byte{}, leaf...), root...), root, append([]byte("x\n"), leaf...),
		[]byte("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsifQ.eyJqdGkiOiIwYSIsInN1YiI6InNwaWZmZTovL3RkL2EiLCJleHAiOjl9.AAAA\n"), []byte("a.b.c"), nil,
	} {
		f.Add(content)
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		svids, err := shownIn(content)
		if err == nil && len(svids) == 0 {
			t.Fatalf("%q: neither SVIDs nor an error", content)
		}
		for _, s := range svids {
			if s.signedHash == "" {
				t.Fatalf("%q is read as %+v", content, s)
			}
		}
	})
}
