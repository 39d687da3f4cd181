// Package httpauth enforces identity and policy on HTTP.
//
// A server wraps its handler with [Handler] and takes its TLS configuration
// from the identity:
//
//	srv := &http.Server{
//		Handler:           httpauth.Handler(id, mux),
//		TLSConfig:         id.ServerTLS(),
//		ReadHeaderTimeout: 10 * time.Second,
//	}
//	log.Fatal(srv.ListenAndServeTLS("", ""))
//
// Set ReadHeaderTimeout: net/http has no limit of its own for a client that
// connects and says nothing.
//
// A client takes [Client], or [Transport] for an http.Client of its own.
package httpauth
