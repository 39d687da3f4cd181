// Command stranger is a program that knows nothing of Merlon: it is built on
// go-spiffe alone and takes what it needs through SPIFFE_ENDPOINT_SOCKET. The
// integration tests prove with it that the Workload API is the standard's.
//
//	stranger show AUDIENCE     print SVIDs and trust bundles as JSON
//	stranger serve             answer "hello, SPIFFE-ID" over mutual TLS
//	stranger call URL ID       GET URL, whose server must be ID
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	err := run(ctx, os.Args[1:])
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "stranger: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "show":
		return show(ctx, args[1])
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx)
	case len(args) == 3 && args[0] == "call":
		return call(ctx, args[1], args[2])
	}
	return fmt.Errorf("usage: stranger show AUDIENCE | serve | call URL ID")
}

// shown is what `stranger show` prints.
type shown struct {
	SPIFFEID     string `json:"spiffe_id"`
	Chain        string `json:"chain"`  // PEM, leaf first
	Bundle       string `json:"bundle"` // PEM, the roots
	JWTSVID      string `json:"jwt_svid"`
	JWTSVIDID    string `json:"jwt_svid_id"`     // parsed with the fetched JWT bundle
	ValidatedID  string `json:"validated_id"`    // by ValidateJWTSVID
	X509Bundles  int    `json:"x509_bundles"`    // by FetchX509Bundles
	JWTKeysInSet int    `json:"jwt_keys_in_set"` // by FetchJWTBundles
}

func show(ctx context.Context, audience string) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	x509Context, err := client.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	svid := x509Context.DefaultSVID()
	bundle, err := x509Context.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return err
	}
	if _, _, err := x509svid.Verify(svid.Certificates, x509Context.Bundles); err != nil {
		return err
	}
	out := shown{SPIFFEID: svid.ID.String()}
	for _, c := range svid.Certificates {
		out.Chain += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	for _, c := range bundle.X509Authorities() {
		out.Bundle += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	if err := showJWT(ctx, client, audience, &out); err != nil {
		return err
	}
	x509Bundles, err := client.FetchX509Bundles(ctx)
	if err != nil {
		return err
	}
	out.X509Bundles = x509Bundles.Len()
	return json.NewEncoder(os.Stdout).Encode(out)
}

func showJWT(ctx context.Context, client *workloadapi.Client, audience string, out *shown) error {
	token, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	bundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		return err
	}
	out.JWTSVID = token.Marshal()
	parsed, err := jwtsvid.ParseAndValidate(out.JWTSVID, bundles, []string{audience})
	if err != nil {
		return err
	}
	validated, err := client.ValidateJWTSVID(ctx, out.JWTSVID, audience)
	if err != nil {
		return err
	}
	own, err := bundles.GetJWTBundleForTrustDomain(parsed.ID.TrustDomain())
	if err != nil {
		return err
	}
	out.JWTSVIDID, out.ValidatedID, out.JWTKeysInSet = parsed.ID.String(), validated.ID.String(), len(own.JWTAuthorities())
	return nil
}

func serve(ctx context.Context) error {
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	config := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny())
	lis, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		return err
	}
	fmt.Println("https://" + lis.Addr().String())
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, "hello, %s", id)
	})}
	return srv.Serve(lis)
}

func call(ctx context.Context, url, server string) error {
	id, err := spiffeid.FromString(server)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}
