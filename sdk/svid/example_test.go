// What a caller writes first: a mutual-TLS connection to exactly one SPIFFE ID.

package svid_test

import (
	"crypto/tls"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
)

func ExampleTLS() {
	var source interface { // for instance a workloadapi.X509Source of go-spiffe
		x509svid.Source
		x509bundle.Source
	}
	orders := spiffeid.RequireFromString("spiffe://shop.test/orders")
	config := svid.TLS{SVIDs: source, Bundles: source, Admit: svid.AdmitID(orders)}.Client()
	conn, err := tls.Dial("tcp", "orders.internal:8443", config)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	peer, _ := svid.PeerFromState(conn.ConnectionState())
	fmt.Println("connected to", peer.ID)
}
